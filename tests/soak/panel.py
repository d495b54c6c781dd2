"""How well figures of a column, known before any training, order latent spaces by what training on them gives.

outcome    demo-fd of the pictures of two trainings on each latent space of `variants` and on the demo's own two
placebo    a latent space with rotated channels trains as the one that it was made of does
claims     figures that docs say predict the outcome order it well enough; two were named before any training

`python -m tests.soak.panel` writes the table of the finished study to RESULT and into docs/probe.md.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from eval.scores.ranks import RankCorrelation, joint, rank_correlation
from tests.soak.drawn import digest_of
from tests.soak.sweep import Case, Sweep
from tests.soak.variants import CLASS, VARIANTS, save_variant

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "soak/panel"  # kept: a killed soak goes on where it was
RESULT = Path(__file__).with_name("panel.json")
DOCS, BEGIN, END = ROOT / "docs/probe.md", "<!-- panel -->", "<!-- end of the panel -->"
CONFIGS = ROOT / "configs/demo"
VAES = ("vae-plain", "vae-equi")
SOURCES = {"openmoji": "{00000..00007}", "openmoji-val": "00000"}
SEEDS = (0, 1)
PLACEBO = ("plain-rotated", "vae-plain")
GROUPS = ("--groups", "^[^-]*", "--together", "^[a-z]*-[0-9A-F]*")  # of the demo's keys
LEAST = {8: 0.72, 10: 0.64}  # entries -> rank correlation from which a figure is said to predict
JOINT = "linear_reference_given_text with rfd"
NAMED = ("ifid", JOINT)  # the only figures that may be said to, chosen before the first training
SECONDS = 4 * 3600  # all trainings are within the first case
Json = dict[str, Any]


def prepare(folder: Path) -> None:
    """Makes pictures, columns and the study's YAML, where they are missing."""
    if not (folder / "data/prompts.json").exists():
        python("eval.demo.data", folder / "data")
    held_out = folder / "held-out"
    if not held_out.exists():  # whole: a part of it would be another reference
        staging = held_out.with_name("held-out.part")
        with tarfile.open(folder / "data/openmoji-val/00000.tar") as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            tar.extractall(staging, members, filter="data")
        staging.rename(held_out)
    encode(
        folder,
        "base",
        {vae: {"class": "AutoencoderKL", "path": str(CONFIGS / vae)} for vae in VAES},
    )
    encoders = {}
    for name, (vae, kind) in VARIANTS.items():
        path = folder / "vaes" / name
        if not (path / "variant.safetensors").exists():
            save_variant(kind, CONFIGS / vae, folder / "cache/openmoji" / vae, path)
        encoders[name] = {"class": CLASS, "path": str(path)}
    encode(folder, "variants", encoders)
    train = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    del train["runs"], train["data"]["latents"]
    train["data"]["text"] = f"{folder}/cache/openmoji/minilm"
    train["validation"]["source"] = f"{folder}/cache/openmoji-val"
    write(folder / "train.yaml", train)
    entries = [*VAES, *VARIANTS]
    study = {
        "train": f"{folder}/train.yaml",
        "entries": {name: f"{folder}/cache/openmoji/{name}" for name in entries},
        "seeds": list(SEEDS),
        "prompts": f"{folder}/data/prompts.json",
        "settle": None,
        "scorers": [{"demo-fd": {"reference": str(held_out), "label": "held-out"}}],
        "generate": {"guidance_scale": 3, "batch_size": 70, "allow-class": [CLASS]},
        "reuse": [],
    }
    write(folder / "study.yaml", study)


def encode(folder: Path, name: str, encoders: dict[str, dict[str, str]]) -> None:
    """Encodes both sources by each encoder; by the demo's text encoder too where VAES are made."""
    config = yaml.safe_load((CONFIGS / "encode.yaml").read_text())
    columns = {
        each: {"kind": "moments", "encoder": encoder, "resolution": 64}
        for each, encoder in encoders.items()
    }
    if name == "base":
        columns["minilm"] = config["columns"]["minilm"]
    config |= {
        "root": f"{folder}/cache",
        "sources": {
            source: f"{folder}/data/{source}/{tars}.tar" for source, tars in SOURCES.items()
        },
        "columns": columns,
        "engine": {"workers": 1},
    }
    write(folder / f"encode-{name}.yaml", config)
    python("encode", "run", folder / f"encode-{name}.yaml")


def study(folder: Path) -> None:
    """Trains, samples and scores what is missing."""
    python("eval", "study", "run", folder / "study.yaml", "--out", folder / "study", "--jobs", 2)


def finished() -> Path:
    """Returns the folder with study, columns and figures, made by one process at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(FOLDER)
        study(FOLDER)
        judge(FOLDER)
    return FOLDER


def judge(folder: Path) -> None:
    """Writes the figures of each column, and of its reconstructions, where they are missing."""
    entries = [*VAES, *VARIANTS]
    if not (folder / "probe.json").exists():
        columns = [folder / "cache/openmoji" / name for name in entries]
        text = folder / "cache/openmoji/minilm"
        python("eval", "probe", *columns, "--text", text, *GROUPS, "--json", folder / "probe.json")
    for name in entries:
        out = folder / "reconstructions" / name
        if not any((out / "reconstruction/scores").glob("idemo-fd-*.json")):
            python(
                "eval", "reconstruct", folder / "cache/openmoji-val" / name, "--save_dir", out,
                "--tars", folder / "data/openmoji-val", "--count", 280, "--batch_size", 70,
                "--scores", "rdemo-fd", "idemo-fd", "--neighbours_of", folder / "cache/openmoji" / name,
                "--allow-class", CLASS,
            )  # fmt: skip
    python("eval", "study", "report", folder / "study.yaml", "--out", folder / "study")


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the figures of each entry that all entries have, by name; lower is better of none by rule."""
    probed = json.loads((folder / "probe.json").read_text())["columns"]
    by_name = {Path(record["column"]).name: record for record in probed}
    panel: dict[str, dict[str, float]] = {}
    for name in [*VAES, *VARIANTS]:
        record = by_name[name]
        values = {k: v["value"] for k, v in record.items() if isinstance(v, dict) and "value" in v}
        scores = folder / "reconstructions" / name / "reconstruction/scores"
        for figure, pattern in (("psnr", "psnr"), ("rfd", "rdemo-fd-*"), ("ifid", "idemo-fd-*")):
            (path,) = scores.glob(f"{pattern}.json")
            values[figure] = json.loads(path.read_text())["value"]["value"]
        panel[name] = values
    shared = [k for k in panel[VAES[0]] if all(v.get(k) is not None for v in panel.values())]
    return {name: {k: values[k] for k in shared} for name, values in panel.items()}


def outcomes(folder: Path) -> tuple[dict[str, list[float]], float, int]:
    """Returns demo-fd by seed of each entry, and the deviation of seeds with its degrees of freedom."""
    score = json.loads((folder / "study/study.json").read_text())["scores"][0]
    by_entry = {
        name: [value["value"] for value in entry["by_seed"].values()]
        for name, entry in zip([*VAES, *VARIANTS], score["entries"], strict=True)
    }
    return by_entry, score["deviation"]["value"], score["deviation"]["freedom"]


def correlations(
    panel: Mapping[str, Mapping[str, float]], scores: Mapping[str, Sequence[float]]
) -> dict[str, RankCorrelation]:
    """Returns each figure's rank correlation with demo-fd over the entries but the placebo; of JOINT
    that of the mean of both ranks.
    """
    entries = [name for name in panel if name != PLACEBO[0]]
    outcome = [sum(scores[name]) / len(scores[name]) for name in entries]
    of = {k: [panel[name][k] for name in entries] for k in panel[entries[0]]}
    of[JOINT] = joint({k: of[k] for k in ("linear_reference_given_text", "rfd")})
    ranked = {k: rank_correlation(values, outcome) for k, values in of.items()}
    return {k: value for k, value in ranked.items() if value is not None}


def predicting(ranked: Mapping[str, RankCorrelation]) -> list[str]:
    """Returns the figures that may be said to predict."""
    return [k for k in NAMED if k in ranked and ranked[k].value >= LEAST[ranked[k].entries]]


def check(kind: str) -> Mapping[str, Sequence[int]]:
    """AssertionError where the placebo differs beyond the noise of seeds, or a claim of RESULT is not met."""
    folder = finished()
    scores, deviation, freedom = outcomes(folder)
    if kind == "placebo":
        from scipy.stats import t

        a, b = (sum(scores[name]) / len(scores[name]) for name in PLACEBO)
        limit = float(t.ppf(0.975, freedom)) * deviation * sqrt(2 / len(SEEDS))
        assert abs(a - b) <= limit, (
            f"rotated channels move demo-fd by {a - b:.2f}, expected {limit:.2f} at most"
        )
        return {"placebo": [digest_of(kind, ())]}
    ranked = correlations(figures(folder), scores)
    claimed = json.loads(RESULT.read_text())["predicts"]
    missed = [name for name in claimed if name not in predicting(ranked)]
    assert not missed, (
        f"said to predict, but do not: {', '.join(f'{k} {ranked[k]}' for k in missed)}"
    )
    return {
        f"{k}: {v.value:+.2f}": [digest_of(kind, (k,))] for k, v in ranked.items() if k in NAMED
    }


# The table ---------------------------------------------------------------------------------------


def result(folder: Path) -> Json:
    """Returns what is committed of a finished study."""
    from tests.soak.runner import code

    scores, deviation, freedom = outcomes(folder)
    panel = figures(folder)
    ranked = correlations(panel, scores)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "code": code("panel"), "deviation": round(deviation, 3),
        "freedom": freedom,
        "entries": {
            name: {"demo-fd": [round(v, 3) for v in scores[name]], **{k: round(v, 4) for k, v in panel[name].items()}}
            for name in panel
        },
        "ranks": {
            k: {"value": round(v.value, 3), "low": v.low and round(v.low, 3), "high": v.high and round(v.high, 3),
                "entries": v.entries}
            for k, v in ranked.items()
        },
        "predicts": predicting(ranked),
    }  # fmt: skip


def text(record: Json) -> str:
    """Returns the tables of docs/probe.md."""
    shown = ("linear_reference_given_text", "text_r2", "lds", "rfd", "ifid")
    lines = [
        f"Run on {record['date']}, code {record['code']}; seeds move demo-fd by {record['deviation']:.2f}.", "",
        f"| entry | demo-fd of two seeds | {' | '.join(f'`{k}`' for k in shown)} |",
        f"|---|---|{'--:|' * len(shown)}",
    ]  # fmt: skip
    for name, values in record["entries"].items():
        seeds = ", ".join(f"{v:.2f}" for v in values["demo-fd"])
        lines.append(f"| {name} | {seeds} | {' | '.join(f'{values[k]:.3g}' for k in shown)} |")
    lines += ["", "| figure | rank correlation with demo-fd | named before |", "|---|---|---|"]
    for k, v in sorted(record["ranks"].items(), key=lambda item: -abs(item[1]["value"])):
        interval = "" if v["low"] is None else f" [{v['low']:+.2f}, {v['high']:+.2f}]"
        lines.append(f"| `{k}` | {v['value']:+.2f}{interval} | {'yes' if k in NAMED else 'no'} |")
    claims = [f"`{k}` predicts the order of these entries." for k in record["predicts"]]
    least = LEAST[next(iter(record["ranks"].values()))["entries"]]
    none = f"Neither of the figures that were named before reaches {least}, from which it would be said to order them."
    return "\n".join([*lines, "", *(claims or [none])])


def with_tables(page: str, record: Json) -> str:
    """Returns docs/probe.md with the tables of a result."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text(record)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    record = result(finished())
    RESULT.write_text(f"{json.dumps(record, indent=1)}\n")
    DOCS.write_text(with_tables(DOCS.read_text(), record))
    print(text(record))


def write(path: Path, config: object) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def python(*words: object) -> None:
    """AssertionError, with the end of its output, where a command fails."""
    command = [sys.executable, "-m", *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, f"{' '.join(command)}: {(ended.stdout + ended.stderr)[-1000:]}"


def cases() -> list[Case]:
    return [("placebo",), ("claims",)]


SWEEP = Sweep(
    "panel", "what two trainings on each of eleven latent spaces say of figures known before",
    cases, check, lambda case: str(case[0]), seconds=SECONDS,
)  # fmt: skip

if __name__ == "__main__":
    main()
