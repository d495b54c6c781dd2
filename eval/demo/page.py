"""demo/report.html and demo/summary.json, from what the demo's commands left behind. Nothing is
typed in by hand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from shards import Column, atomic_write, canonical_json, charts
from train.checkpoints.checkpoint import load_for_sampling
from train.checkpoints.identity import initial_share

from ..report.entries import open_all
from ..report.pairing import Pairing, pairing_of
from .classifier import load_classifier
from .pages import embed, environment
from .score import Json, compare, encoding_cost, judge, read_metrics

TEXT = "minilm"
PER_GROUP = 4  # prompts shown of each group
SHOWN = 14  # reconstructions shown
SEEN = {"openmoji-val": "held out", "photos": "which the VAEs were trained on too"}
TEMPLATE = "demo/report.html.j2"


def write_report(
    out: Path, vaes: Sequence[str], classifier_folder: Path, commands: list[str], clock: Json
) -> Json:
    """Judge, compare and write both files; returns the summary."""
    prompts = [json.loads(line) for line in (out / "data/prompts.jsonl").read_text().splitlines()]
    reconstructed = {vae: metrics_of(out, "openmoji-val", vae) for vae in vaes}
    row_of = {p["key"]: f"{p['row']:08d}" for p in reconstructed[vaes[0]]["pictures"]}
    prompts = [p for p in prompts if p["key"] in row_of]
    groups = [p["group"] for p in prompts]
    classifier = load_classifier(classifier_folder)
    real_files = [
        out / f"reconstructions/openmoji-val/{vaes[0]}/original/images/{row_of[p['key']]}.png"
        for p in prompts
    ]
    real = judge(classifier, real_files, groups)
    generated = {
        vae: judge(classifier, [image_file(out, vae, p["key"]) for p in prompts], groups)
        for vae in vaes
    }
    decoded = {
        vae: judge(
            classifier, [reconstruction_file(out, vae, row_of[p["key"]]) for p in prompts], groups
        )
        for vae in vaes
    }
    first, second = open_all([out / "images" / vae for vae in vaes])
    pairing = pairing_of(first, second)
    found = compare(generated, real)
    runs = {vae: run_of(out / f"runs/train-{vae}") for vae in vaes}
    encoded = json.loads((out / "cache/report.json").read_text())
    chance = 1 / len(classifier.groups)
    summary: Json = {
        **found,
        "verdict": limited(found["verdict"], pairing),
        "pairing": {
            "sentence": pairing.sentence,
            "paired": pairing.paired,
            "warnings": list(pairing.warnings),
            "notes": [
                f"{scored.name}: {note}" for scored in (first, second) for note in scored.notes
            ],
        },
        "chance": chance,
        "accuracy_of_real_pictures": float(real.right.mean()),
        "accuracy_of_reconstructions": {v: float(j.right.mean()) for v, j in decoded.items()},
        "margin_over_chance": {
            vae: scores["demo-acc"]["low"] - chance for vae, scores in found["scores"].items()
        },
        "accuracy_by_group": {
            vae: by_group(judged.right, groups) for vae, judged in generated.items()
        },
        "reconstruction": {
            source: {vae: metrics_of(out, source, vae)["mean"] for vae in vaes} for source in SEEN
        },
        "columns": {
            str(Path(path).relative_to((out / "cache").resolve())): column_of(Path(path), column)
            for path, column in encoded.items()
        },
        "runs": {
            vae: {k: v for k, v in run.items() if k != "metrics"} for vae, run in runs.items()
        },
        "encoding": {
            vae: encoding_cost(encoded, vae, TEXT, run["samples"], run["seconds"])
            for vae, run in runs.items()
        },
        "commands": commands,
        "seconds": clock,
    }
    atomic_write(out / "summary.json", canonical_json(summary))
    real_of = dict(zip((p["key"] for p in prompts), real_files, strict=True))
    shown = [
        p
        for group in classifier.groups
        for p in [p for p in prompts if p["group"] == group][:PER_GROUP]
    ]
    metrics = {vae: run["metrics"] for vae, run in runs.items()}
    html = page_of(out, summary, vaes, metrics, shown, real_of)
    atomic_write(out / "report.html", html.encode())
    return summary


def limited(verdict: str, pairing: Pairing) -> str:
    """A verdict with what it does not say."""
    before = "" if pairing.paired else f"{pairing.sentence} "
    return (
        f"{before}{verdict} The intervals are over prompts: they do not cover other training seeds."
    )


def page_of(
    out: Path, summary: Json, vaes: Sequence[str], metrics: dict[str, list[Json]],
    shown: Sequence[Json], real_of: dict[str, Path],
) -> str:  # fmt: skip
    """The report as one self-contained HTML page; `shown` are the prompts whose pictures it has, `real_of` the real
    picture of each prompt's key.
    """
    samples = [
        {
            "prompt": p["prompt"],
            "group": p["group"],
            "pictures": [enlarged(image_file(out, vae, p["key"])) for vae in vaes],
            "real": enlarged(real_of[p["key"]]),
        }
        for p in shown
    ]
    html: str = environment().get_template(TEMPLATE).render(
        s=summary, vaes=vaes, curves=curves(metrics), samples=samples, style=Markup(charts.style()),
        reconstructions=[reconstruction_strip(out, source, vaes) for source in SEEN],
    )  # fmt: skip
    return html


def image_file(out: Path, vae: str, key: str) -> Path:
    return out / f"images/{vae}/images/{key}.png"


def reconstruction_file(out: Path, vae: str, row: str) -> Path:
    return out / f"reconstructions/openmoji-val/{vae}/reconstruction/images/{row}.png"


def metrics_of(out: Path, source: str, vae: str) -> Json:
    return dict(json.loads((out / f"reconstructions/{source}/{vae}/metrics.json").read_text()))


def by_group(right: Any, groups: list[str]) -> dict[str, float]:
    names = np.array(groups)
    return {name: float(right[names == name].mean()) for name in dict.fromkeys(groups)}


def column_of(path: Path, column: Json) -> Json:
    """A column's line in the table, with its row shape from the column itself."""
    layout = Column.open(path).layout
    return {**column, "kind": layout.kind, "row_shape": list(layout.row_shape)}


def run_of(run: Path) -> Json:
    """Steps, samples, seconds and losses of a training run."""
    metrics = read_metrics(run)
    model, manifest = load_for_sampling(run)
    steps = [m for m in metrics if "samples_per_second" in m]
    interval = steps[0]["step"] if steps else 0
    batch = manifest["config"]["global_batch"]
    validation = [m for m in metrics if "validation" in m]
    return {
        "steps": manifest["step"],
        "samples": manifest["position"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(interval * batch / m["samples_per_second"] for m in steps),
        "samples_per_second": float(np.mean([m["samples_per_second"] for m in steps])),
        "data_wait": float(np.mean([m["data_wait"] for m in steps])),
        "validation": validation[-1]["validation"] if validation else None,
        "initial_share": initial_share(manifest),
        "metrics": metrics,
    }


def curves(metrics: dict[str, list[Json]]) -> str:
    """Training and validation loss over samples, each divided by the variance of its own target,
    as one SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    grey = "#888888"
    style = {"text.color": grey, "axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey,
             "axes.edgecolor": grey, "svg.fonttype": "none", "font.size": 11}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        for colour, (vae, lines) in zip(("#d2691e", "#2a7fb8"), metrics.items(), strict=True):
            validation = [m for m in lines if "validation" in m]
            last = validation[-1]["validation"]
            variance = last["loss"] / last["normalised"]
            training = [m for m in lines if "loss" in m]
            axes.plot([m["step"] for m in training], [m["loss"] / variance for m in training],
                      color=colour, alpha=0.4, linewidth=1, label=f"{vae}, training")  # fmt: skip
            axes.plot([m["step"] for m in validation], [m["validation"]["normalised"] for m in validation],
                      color=colour, marker="o", markersize=3, label=f"{vae}, validation (EMA)")  # fmt: skip
        axes.set(xlabel="step", ylabel="loss / variance of the target", yscale="log")
        axes.grid(color=grey, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, labelcolor=grey)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def reconstruction_strip(out: Path, source: str, vaes: Sequence[str]) -> Json:
    """The same pictures: originals, then each VAE's reconstruction, spread over the
    source.
    """
    pictures = metrics_of(out, source, vaes[0])["pictures"]
    chosen = [pictures[i]["row"] for i in np.linspace(0, len(pictures) - 1, SHOWN).astype(int)]
    folders = {"original": out / f"reconstructions/{source}/{vaes[0]}/original/images"}
    folders |= {vae: out / f"reconstructions/{source}/{vae}/reconstruction/images" for vae in vaes}
    strips = {n: [enlarged(f / f"{row:08d}.png") for row in chosen] for n, f in folders.items()}
    return {"source": source, "seen": SEEN[source], "strips": strips}


def enlarged(file: Path) -> str:
    """A picture as a data URI, twice as large without smoothing so that what is there is seen."""
    image = Image.open(file)
    image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    return embed(image, optimize=True)
