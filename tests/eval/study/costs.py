"""The table of costs in docs/running-studies.md, from `study plan`: `python -m tests.eval.study.costs` writes it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from eval.study.study import Study
from shards.console import size_text
from train.model.flops import GPUS
from train.plan.caching_speedup import PADDED, VAES, Efficiency, gemma

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/running-studies.md"
STUDY = ROOT / "configs/study/six-vaes.yaml"
START = "<!-- python -m tests.eval.study.costs writes this table -->\n"
END = "<!-- end -->\n"
MODELS = {"0.70 B": "dit700m_256", "2.66 B": "dit3b_256"}
GPU, NUMBER, PRICE, SAMPLES, TOKENS = "h100", 8, 2.5, "27_200_000,4_800_000", 121
Json = dict[str, Any]


def plan(train: str) -> Json:
    """Returns the JSON that `study plan` writes of the six VAEs, trained by a shipped config."""
    from eval.commands import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = folder / "six-vaes.yaml"
        study.write_text(STUDY.read_text().replace("dit3b_256", train))
        words = ["study", "plan", str(study), "--out", str(folder / "out"), "--gpu", GPU]
        words += ["--gpus", str(NUMBER), "--price", str(PRICE), "--samples", SAMPLES]
        main([*words, "--tokens", str(TOKENS), "--json", str(folder / "plan.json")])
        record: Json = json.loads((folder / "plan.json").read_text())
    return record


def encoders_in_every_step() -> float:
    """Returns the GPU hours of both encoders in the steps of all trainings."""
    study = Study.open(STUDY)
    config, share = study.train_config(study.baseline, 0), Efficiency()
    flops = 0.0
    for entry in study.entries:
        vae = VAES["Qwen-Image" if entry.startswith("qwen") else "FLUX, SD-3.5"][256] * 1e9
        flops += (vae / share.vae + gemma(PADDED) / share.llm) * config.steps * config.global_batch
    return flops * len(study.seeds) / GPUS[GPU].peak / 3600


def text_hours() -> float:
    """Returns the GPU hours of the column of text."""
    rows = sum(map(int, SAMPLES.split(",")))
    return rows * gemma(TOKENS) / Efficiency().llm / GPUS[GPU].peak / 3600


def table() -> str:
    """Returns the table as Markdown."""
    plans = {name: plan(train) for name, train in MODELS.items()}
    first = next(iter(plans.values()))
    study = Study.open(STUDY)
    sides = len(study.entries) * len(study.seeds)
    sets = sides * len(study.steps)
    trials = sides * sum(len(study.axes[axis]) for axis in study.sampling_axes)
    trainings = first["train"]["nodes"]

    def row(title: str, value: Any) -> str:
        return f"| {title} | {' | '.join(value(record) for record in plans.values())} |"

    def hours(kind: str) -> Any:
        return lambda record: f"{record[kind]['gpu_hours']:,.0f}"

    def size(part: str) -> Any:
        return lambda record: size_text(record["files"][part]["bytes"])

    once, online = text_hours(), encoders_in_every_step()
    rows = [
        f"| GPU hours | {' | '.join(plans)} |",
        f"|{'---|' * (len(plans) + 1)}",
        row("six columns of latents, in one pass over the tars", hours("encode")),
        row("the column of text, which `encode run` makes", lambda _: f"{once:,.0f}"),
        row(f"{trainings} trainings", hours("train")),
        row("one of them", lambda record: f"{record['train']['gpu_hours'] / trainings:,.0f}"),
        row(
            f"{sets} sets of {first['pictures_a_set']:,} pictures; {trials} of half as many, which choose settings",
            hours("generate"),
        ),
        row("their scores (GenEval)", hours("score")),
        row("**all that `study run` does**", hours("all")),
        row("in money", lambda record: f"${record['all']['price']:,.0f}"),
        row(
            f"days on {NUMBER} GPUs",
            lambda record: f"{record['all']['gpu_hours'] / NUMBER / 24:,.0f}",
        ),
        row("both encoders in every step instead of columns, more", lambda _: f"{online:,.0f}"),
        f"| **Disk** |{' |' * len(plans)}",
        row("columns of latents", size("columns")),
        row("scored checkpoints", size("scored_checkpoints")),
        row("other checkpoints", size("other_checkpoints")),
        row("snapshots of averages", size("ema_snapshots")),
        row("pictures", size("pictures")),
    ]
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """Returns the page with the table in its place."""
    head, _, rest = text.partition(START)
    return f"{head}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
