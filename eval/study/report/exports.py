"""The numbers of a study to take along: a table for LaTeX, a CSV file, and both inside the page."""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from shards.charts import figure
from shards.printing import redacted

from ...errors import BadReport
from .figures import HALF_B, difference_of

Json = dict[str, Any]
# what: "score", or "difference" (the entry minus the baseline). No seed: over all seeds. p_adjusted: Holm's.
# primary: what the verdict is by. prompts: ALL of them, or where settings were chosen on half A: HALF, or WHOLE
COLUMNS = (
    "what", "scorer", "better", "primary", "entry", "baseline", "step", "seed", "value", "low", "high",
    "count", "p", "p_adjusted", "prompts",
)  # fmt: skip
HEADS = (
    ",".join(COLUMNS),
    ",".join(COLUMNS[:-1]),
)  # of tables now, and before they said of which prompts
ALL, HALF, WHOLE = "all", "half B", "all: contains the half that settings were chosen on"


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
    for part, prompts in _parts(data):
        rows = chain(_scores(part), _differences(part))
        table.writerows(row | {"prompts": prompts} for row in rows)
    return file.getvalue()


def _parts(data: Json) -> list[tuple[Json, str]]:
    """Returns what is reported, the verdict's prompts first, each with the label of its prompts.

    The whole set of a study whose settings were chosen on half A is that of the last step alone, and none of its
    scores is the primary one.
    """
    whole = data.get("whole")
    if whole is None:
        return [(data, ALL)]
    scores = [score | {"primary": False} for score in whole["scores"]]
    of_whole = {"scores": scores, "over_steps": []}
    return [(data, HALF), (data | whole | of_whole, WHOLE)]


def refuse_other_csv(path: Path) -> None:
    """Raises BadReport where a file that `as_csv` did not make has the name."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.readline()
    except FileNotFoundError:
        return
    if head.rstrip("\n") not in HEADS:
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

    Where settings were chosen on half A of the prompts, the rows of half B come first, below them those of all
    prompts, each under a line that says so.
    """
    baseline, parts = escaped(data["baseline"]), _parts(data)
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    names = [_of_all(score) for score in data["scores"]]
    heads = [
        rf"\multicolumn{{2}}{{c}}{{{escaped(name)} {arrows[score['better']]}}}"
        for name, score in zip(names, data["scores"], strict=True)
    ]
    rules = [rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(names))]
    rows = []
    for part, prompts in parts:
        rows.append(r"\midrule")
        if len(parts) > 1:
            width, label = 1 + 2 * len(names), escaped(_label(part["prompts"], prompts))
            rows.append(_row([rf"\multicolumn{{{width}}}{{l}}{{{label}}}"]))
        scores = {_of_all(score): score for score in part["scores"]}
        own = [scores.get(name) for name in names]
        rows += [_entry(part, i, own) for i in range(len(data["entries"]))]
    return "\n".join(
        [
            *_comments(data),
            rf"\begin{{tabular}}{{l{'cc' * len(names)}}}",
            r"\toprule",
            _row(["", *heads]),
            " ".join(rules),
            _row(["", *(cell for _ in names for cell in ("mean", rf"$-$ {baseline}"))]),
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _of_all(score: Json) -> str:
    """Returns the name that a score of a half has where it is of all prompts."""
    name: str = score["scorer"]
    return name.removesuffix(HALF_B)


def _label(count: int | None, prompts: str) -> str:
    """Returns "half B: 140 prompts" or "all 280 prompts: contains ..."; without the count where it is not known."""
    if count is None:
        return prompts
    return (
        f"{HALF}: {count:,} prompts"
        if prompts == HALF
        else WHOLE.replace(ALL, f"{ALL} {count:,} prompts", 1)
    )


def _entry(part: Json, i: int, scores: Sequence[Json | None]) -> str:
    """Returns the row of an entry, by its number; a score that this part has no set of is a dash."""
    name = part["entries"][i]["name"]
    cells = [escaped(name)]
    for score in scores:
        value = score["entries"][i]["over_seeds"] if score else None
        difference = difference_of(part, name, score["scorer"]) if score else None
        cells += [_cell(value, figure), _difference(difference)]
    return _row(cells)


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
    if data.get("whole") is not None:
        lines.append(
            "% settings were chosen for each entry on half A of the prompts: the verdict is by half B, none by the "
            "rows of all prompts"
        )
    compared = len(data["entries"]) - 1
    if compared > 1 and data["primary"]["scorer"]:
        half = f" of {HALF}" if data.get("whole") is not None else ""
        name = escaped(data["primary"]["scorer"].removesuffix(HALF_B))
        lines.append(
            f"% p of {name}{half} is after Holm's adjustment over {compared} entries; other p are not adjusted"
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
