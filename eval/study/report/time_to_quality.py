"""How much sooner each entry reaches a quality than the baseline does, in steps and in what a step costs.

Of each entry but the baseline, by the primary score: entry, outcome ("sooner", "later", "not resolved"; null
without a figure), sentence, by_seed {seed: level, baseline and entry (steps), ratio}, spacing (of the checkpoints,
a factor), units[]: unit ("steps", "samples", "FLOPs", "hours", "GPU hours", "money"), baseline and entry (what each
takes to reach the level, the geometric mean over seeds), ratio (a Value: above 1 is sooner), outcome. A unit is
left out where the runs recorded nothing of it. Of an entry with phases it is the last phase alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from train.report import read_records

from ...errors import EvalError
from ...report.compare import estimate_of
from ...report.cost import training_cost
from ...scores.seeds import SEEDS_OF_A_VERDICT, Estimate
from ...scores.time_to_quality import (
    Crossing,
    NoFigure,
    TimeToQuality,
    crossing,
    outcome_of,
    time_to_quality,
)
from .sets import Sets

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
Costs = Mapping[str, Mapping[str, float]]  # {entry: {unit: what a step takes}}


def step_costs(study: Study) -> Costs:
    """Returns what a step of each entry takes, by unit; empty where a single step is scored."""
    names = study.entries if len(study.steps) > 1 else ()
    return {name: _cost_of_a_step(study, name) for name in names}


def times_to_quality(study: Study, sets: Sets, scorer: str | None, costs: Costs) -> list[Json]:
    """Returns a record of each entry but the baseline; none where a single step is scored.

    `costs` are those of `step_costs`.
    """
    if len(study.steps) < 2:
        return []
    names = [name for name in study.entries if name != study.baseline]
    return [_record(study, sets, name, scorer, costs) for name in names]


def _record(study: Study, sets: Sets, name: str, scorer: str | None, costs: Costs) -> Json:
    record: Json = {"entry": name, "outcome": None, "by_seed": {}, "spacing": None, "units": []}
    try:
        crossings = _crossings(study, sets, name, scorer)
        result = time_to_quality(crossings)
    except (NoFigure, EvalError) as error:
        return record | {"sentence": f"No time to quality for {name}: {error}."}
    units = _units(costs[study.baseline], costs[name], result)
    ratio = result.ratio
    outcome = outcome_of(ratio)
    amount = f"{ratio.value:.3g} times [{ratio.low:.3g}, {ratio.high:.3g}]"
    sentence = {
        "sooner": f"{name} reaches the same quality sooner than {study.baseline}",
        "later": f"{name} reaches the same quality later than {study.baseline}",
        "not resolved": f"Whether {name} or {study.baseline} reaches the same quality sooner is not resolved",
    }[outcome]
    seeds = f"over {len(crossings)} training seeds"
    return record | {
        "outcome": outcome,
        "sentence": f"{sentence}: {study.baseline} takes {amount} as many steps, {seeds}.",
        "by_seed": {
            str(seed): {"level": c.level, "baseline": c.baseline, "entry": c.entry, "ratio": exp(c.log_ratio.value)}
            for seed, c in crossings.items()
        },
        "spacing": exp(result.spacing),
        "units": units,
    }  # fmt: skip


def _crossings(study: Study, sets: Sets, name: str, scorer: str | None) -> dict[int, Crossing]:
    """Returns the crossings of the seeds that have all scores; NoFigure where they are too few."""
    crossings, lacking = {}, []
    for seed in study.seeds:
        curves: list[list[Estimate]] = []
        better = ""
        for entry in (study.baseline, name):
            curve = []
            for step in study.steps:
                scored = sets.get((entry, seed, step))
                if scored is None or scorer not in scored.scores:
                    lacking.append(f"{entry}, seed {seed}, has no score at step {step:,}")
                    continue
                score = scored.scores[scorer]
                better = score.better
                curve.append(estimate_of(scored.score_folder, score))
            curves.append(curve)
        if all(len(curve) == len(study.steps) for curve in curves):
            try:
                crossings[seed] = crossing(study.steps, curves[0], curves[1], better)
            except NoFigure as error:
                raise NoFigure(f"in training seed {seed}, {error}") from None
    if lacking and len(crossings) < SEEDS_OF_A_VERDICT:
        raise NoFigure(lacking[0])
    return crossings


def _units(
    baseline: Mapping[str, float], entry: Mapping[str, float], result: TimeToQuality
) -> list[Json]:
    """Returns a record a unit, from what a step of the baseline and of the entry takes in each."""
    steps = [
        exp(fmean(log(getattr(crossing, side)) for crossing in result.by_seed.values()))
        for side in ("baseline", "entry")
    ]
    units = []
    for unit in baseline:
        first, second = baseline[unit], entry.get(unit)
        if not first or not second:
            continue
        ratio = result.times(first / second)
        units.append(
            {
                "unit": unit, "baseline": steps[0] * first, "entry": steps[1] * second,
                "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high, "count": ratio.count},
                "outcome": outcome_of(ratio),
            }
        )  # fmt: skip
    return units


def _cost_of_a_step(study: Study, name: str) -> dict[str, float]:
    """Returns what a step of an entry takes in each unit, the mean over its seeds."""
    samples = study.train_config(name, study.seeds[0]).global_batch
    cost = {"steps": 1.0, "samples": float(samples)}
    runs = [study.run_folder(name, seed) for seed in study.seeds]
    if flops := [value for run in runs if (value := _flops_of_a_sample(run / "metrics.jsonl"))]:
        cost["FLOPs"] = fmean(flops) * samples
    measured = [c for run in runs if (c := training_cost(run, study.steps[-1])) and c["step"]]
    if measured:
        cost["hours"] = fmean(c["seconds"] / c["step"] for c in measured) / 3600
        cost["GPU hours"] = fmean(c["gpu_hours"] / c["step"] for c in measured)
        if study.config.price is not None:
            cost["money"] = cost["GPU hours"] * study.config.price
    return cost


def _flops_of_a_sample(metrics: Path) -> float | None:
    """Returns the FLOPs of a sample, forward and backward, from a run's log; None of an older one."""
    image = token = None
    tokens = []
    for record in read_records(metrics):
        if isinstance(start := record.get("start"), dict):
            image, token = start.get("flops_a_sample"), start.get("flops_a_text_token")
        if record.get("text_tokens"):
            tokens.append(record["text_tokens"])
    if image is None or token is None or not tokens:
        return None
    return float(image + token * fmean(tokens))
