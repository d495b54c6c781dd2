"""The numbers of a study to take along: a table for LaTeX, a CSV file, and both inside the page."""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.charts import figure
from shards.printing import redacted

from ...errors import BadReport
from .figures import difference_of

Json = dict[str, Any]
# what: "score", or "difference" (the entry minus the baseline). No seed: over all seeds. p_adjusted: Holm's
COLUMNS = (
    "what", "scorer", "better", "primary", "entry", "baseline", "step", "seed", "value", "low", "high",
    "count", "p", "p_adjusted",
)  # fmt: skip


def downloads(data: Json) -> dict[str, str]:
    """Returns {name of a file: its address} of what a page holds, without passwords of urls."""
    safe = _redacted(data)
    return {
        "study.csv": _data_uri(as_csv(safe), "text/csv"),
        "study.json": _data_uri(json.dumps(safe), "application/json"),
    }


def _data_uri(text: str, kind: str) -> str:
    return f"data:{kind};charset=utf-8;base64,{b64encode(text.encode()).decode()}"


def _redacted(value: Any) -> Any:
    """Returns parts of a JSON with all texts as the page prints them: it is not seen in base64."""
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


# CSV ----------------------------------------------------------------------------------------------


def as_csv(data: Json) -> str:
    """Returns all scores and differences, a row a value, with the names of COLUMNS above them."""
    file = io.StringIO()
    table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(_scores(data))
    table.writerows(_differences(data))
    return file.getvalue()


def refuse_other_csv(path: Path) -> None:
    """Raises BadReport where a file that `as_csv` did not make has the name."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.readline()
    except FileNotFoundError:
        return
    if head.rstrip("\n") != ",".join(COLUMNS):
        raise BadReport(
            f"{path}: found a file that is no table of ours, expected none: move it away"
        )


def _scores(data: Json) -> Iterator[Json]:
    names = [entry["name"] for entry in data["entries"]]
    scores = {score["scorer"]: score for score in data["scores"]}
    records = data["over_steps"] or [
        {"scorer": score["scorer"], "entry": name, "points": [{"step": data["step"], **values}]}
        for score in data["scores"]
        for name, values in zip(names, score["entries"], strict=True)
    ]
    for record in records:
        score = scores.get(record["scorer"], {})
        head = {"what": "score", "scorer": record["scorer"], "entry": record["entry"]}
        head |= _about(score)
        for point in record["points"]:
            yield from _values(
                head | {"step": point["step"]}, point["by_seed"], point["over_seeds"]
            )


def _differences(data: Json) -> Iterator[Json]:
    scores = {score["scorer"]: score for score in data["scores"]}
    for comparison in data["comparisons"]:
        for difference in comparison["differences"]:
            head = {
                "what": "difference", "scorer": difference["scorer"], "entry": comparison["other"],
                "baseline": comparison["baseline"], "step": data["step"],
            }  # fmt: skip
            head |= _about(scores[difference["scorer"]])
            levels = {key: difference.get(key) for key in ("p", "p_adjusted")}
            yield from _values(head, difference["by_seed"], difference["value"], levels)


def _about(score: Json) -> Json:
    """Returns what is the same of all values of a score; nothing of one that no set of the last step has."""
    if not score:
        return {}
    return {"better": score["better"], "primary": "true" if score["primary"] else "false"}


def _values(
    head: Json, by_seed: Json, over_seeds: Json | None, more: Json | None = None
) -> Iterator[Json]:
    for seed, value in by_seed.items():
        yield head | {"seed": seed} | value
    if over_seeds:
        yield head | over_seeds | (more or {})


# LaTeX --------------------------------------------------------------------------------------------


def latex(data: Json) -> str:
    """Returns a table for LaTeX with booktabs: a row an entry, and of each score its mean over seeds and its
    difference from the baseline, with 95 % intervals and p.
    """
    scores, baseline = data["scores"], escaped(data["baseline"])
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    heads = [
        rf"\multicolumn{{2}}{{c}}{{{escaped(score['scorer'])} {arrows[score['better']]}}}"
        for score in scores
    ]
    rules = [rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(scores))]
    rows = []
    for i, entry in enumerate(data["entries"]):
        cells = [escaped(entry["name"])]
        for score in scores:
            cells.append(_cell(score["entries"][i]["over_seeds"], figure))
            cells.append(_difference(difference_of(data, entry["name"], score["scorer"])))
        rows.append(_row(cells))
    return "\n".join(
        [
            *_comments(data),
            rf"\begin{{tabular}}{{l{'cc' * len(scores)}}}",
            r"\toprule",
            _row(["", *heads]),
            " ".join(rules),
            _row(["", *(cell for _ in scores for cell in ("mean", rf"$-$ {baseline}"))]),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def escaped(text: str) -> str:
    """Returns text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}"}
    return "".join(special.get(character, character) for character in " ".join(text.split()))


def _comments(data: Json) -> list[str]:
    seeds = ", ".join(map(str, data["seeds"]))
    lines = [
        r"% needs \usepackage{booktabs}",
        f"% mean over training seeds {seeds}, and difference from the baseline in pairs of one seed, with 95 % "
        "intervals over seeds and prompts",
    ]
    if any(record["prompts"] for record in data.get("settled") or ()):
        lines.append(
            "% settings were chosen for each entry on half A of the prompts: all figures are of half B"
        )
    compared = len(data["entries"]) - 1
    if compared > 1 and data["primary"]["scorer"]:
        lines.append(
            f"% p of {escaped(data['primary']['scorer'])} is after Holm's adjustment over {compared} entries; other p "
            "are not adjusted"
        )
    return lines


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _difference(difference: Json | None) -> str:
    if difference is None or difference["value"] is None:
        return "--"
    p = difference.get("p_adjusted", difference["p"])
    level = "" if p is None else r", $p < 0.001$" if p < 0.001 else f", $p = {p:.2g}$"
    return _cell(difference["value"], "{:+,.3g}".format) + level


def _cell(value: Json | None, text: Callable[[float], str]) -> str:
    """Returns a value with its interval in math mode, so that signs are minus signs."""
    if value is None:
        return "--"
    number, low, high = (
        None if end is None else _math(text(end))
        for end in (value["value"], value["low"], value["high"])
    )
    return f"${number}$" if low is None else f"${number}\\ [{low},\\ {high}]$"


def _math(number: str) -> str:
    """Returns a number as math mode prints it: "1,234" keeps its comma, and "1e-05" is a power of ten."""
    mantissa, _, exponent = number.partition("e")
    mantissa = mantissa.replace(",", "{,}")
    if re.fullmatch(r"[+-]?(inf|nan)", number):
        return rf"\mathrm{{{number}}}"
    return rf"{mantissa}\times 10^{{{int(exponent)}}}" if exponent else mantissa
