"""The demo's numbers: what the judge makes of generated pictures, and whether the two VAEs differ.

`demo-acc`: share of pictures that the classifier puts into their prompt's group. `demo-fd`:
Frechet distance of its features to those of the held-out pictures. Prompt i of one model and
prompt i of the other share caption and seed, so differences are paired: both are resampled with
the same indices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from encode.models.pixels import to_pixels

from ..distances.frechet import frechet_features
from ..scores.intervals import Interval, bootstrap
from .classifier import Classifier

RESAMPLES = 1_000
Json = dict[str, Any]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """A set of pictures in the order of the prompts: right or wrong (N,), and features (N, F)."""

    right: NDArray[np.bool_]
    features: NDArray[np.float32]

    def accuracy(self, at: Indices) -> float:
        return float(self.right[at].mean())

    def distance(self, real: Judged, at: Indices) -> float:
        return frechet_features(self.features[at], real.features[at])


@torch.inference_mode()
def judge(classifier: Classifier, files: Sequence[Path], groups: Sequence[str]) -> Judged:
    """Look at the pictures of the prompts, whose groups are given."""
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    features, found = [], []
    for part in to_pixels(images).split(64):
        features.append(classifier.features(part))
        found += classifier.logits(part).argmax(1).tolist()
    wanted = [classifier.groups.index(group) for group in groups]
    return Judged(np.array(found) == np.array(wanted), torch.cat(features).numpy())


def interval(statistic: Callable[[Indices], float], units: int) -> Interval:
    return bootstrap(statistic, units, resamples=RESAMPLES)


def compare(generated: dict[str, Judged], real: Judged) -> Json:
    """Scores of each set with 95 % intervals, and the paired differences, second minus first."""
    (a, first), (b, second) = generated.items()
    count = len(real.right)
    scores = {
        name: {
            "demo-acc": asdict(interval(judged.accuracy, count)),
            "demo-fd": asdict(interval(lambda at, j=judged: j.distance(real, at), count)),
        }
        for name, judged in generated.items()
    }
    differences = {
        "demo-acc": interval(lambda at: second.accuracy(at) - first.accuracy(at), count),
        "demo-fd": interval(lambda at: second.distance(real, at) - first.distance(real, at), count),
    }
    return {
        "prompts": count,
        "scores": scores,
        "difference": {name: asdict(value) for name, value in differences.items()},
        "of": f"{b} minus {a}",
        "verdict": verdict(a, b, differences),
    }


def verdict(a: str, b: str, difference: dict[str, Interval]) -> str:
    """Which model is better, if any is shown to be. A lower distance and a higher accuracy are
    better.
    """
    gain = {"demo-acc": difference["demo-acc"].value, "demo-fd": -difference["demo-fd"].value}
    shown = {name for name, value in difference.items() if value.excludes_zero}
    better = {b if gain[name] > 0 else a for name in shown}
    said = ", ".join(
        f"{name} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for name, d in difference.items()
    )
    if not shown:
        return f"No difference shown between {a} and {b} ({b} minus {a}: {said})."
    if len(better) == 2:
        return f"No winner: {a} and {b} are each better in one score ({b} minus {a}: {said})."
    named = " and ".join(sorted(shown))
    return f"{better.pop()} trained the better model by {named} ({b} minus {a}: {said})."


def encoding_cost(report: Json, vae: str, text: str, samples: int, training: float) -> Json:
    """Seconds of one core: encoding every row of the sources once, against encoding in each of a run's
    steps.

    Both from the seconds that the encode run measured for reading, decoding and each model, of
    the rows of all sources; `samples` is how many the training run saw, `training` its wall
    seconds.
    """
    seconds = {vae: 0.0, text: 0.0, "decode": 0.0, "rows": 0.0}
    for path, column in report.items():
        name = Path(path).name
        if name not in (vae, text):
            continue
        seconds[name] += column["seconds"].get(name, 0.0)
        if name == vae:  # both columns record the one decoding pass
            seconds["decode"] += column["seconds"]["read"] + column["seconds"]["decode"]
            seconds["rows"] += column["rows"]
    rows = seconds.pop("rows")
    per_sample = sum(seconds.values()) / rows
    return {
        "rows": int(rows), "seconds_per_sample": per_sample, "once": per_sample * rows,
        "every_step": per_sample * samples, "samples_seen": samples, "training": training,
        "parts": {name: value / rows for name, value in seconds.items()},
    }  # fmt: skip


def read_metrics(run: Path) -> list[Json]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
