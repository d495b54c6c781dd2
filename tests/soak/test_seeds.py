"""Splits of training seeds: how many have a verdict, on sets whose scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.report.compare import Difference
from eval.report.entries import ScoredSet, open_all
from tests.eval.sets import PROMPTS, make_items, make_score, make_set, training
from tests.soak import seeds
from tests.soak.sweep import Sweep, run

SPLITS = 40


def trained(folder: Path, of_seeds: float, of_both: float) -> list[ScoredSet]:
    """12 sets of one entry; the deviations of a seed, and of a seed and a prompt together."""
    random = np.random.default_rng(3)
    prompts = random.normal(size=len(PROMPTS.items))
    for seed in range(seeds.TRAININGS):
        made = make_set(folder / f"{seed}", trained=training({"seed": seed}))
        values = prompts + random.normal(0, of_seeds) + random.normal(0, of_both, len(prompts))
        make_score(made, "demo-acc-1", make_items(values))
    return open_all([folder / f"{seed}" for seed in range(seeds.TRAININGS)])


def test_few_splits_have_a_verdict_and_many_would_by_the_normal_quantile(tmp_path: Path) -> None:
    sets = trained(tmp_path, 0.1, 0.3)
    outcomes = seeds.share_of_verdicts(sets, "demo-acc", SPLITS)
    counts = {kind: len(inputs) for kind, inputs in outcomes.items()}
    assert counts["demo-acc: no verdict"] >= 36
    assert counts["demo-acc, by 1.96: verdict"] > counts.get("demo-acc: verdict", 0)
    assert sum(counts.values()) == 2 * SPLITS
    sweep = Sweep("some", "a score", list, lambda _: outcomes, lambda case: str(case[0]))
    assert run(sweep, [("demo-acc",)]).groups == counts


def test_an_interval_that_is_too_narrow_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter as wide as it should be, the interval gives too many verdicts."""
    sets = trained(tmp_path, 0.1, 0.3)
    whole = seeds.between

    def narrow(sets: Sequence[ScoredSet], drawn: Sequence[int], scorer: str) -> Difference:
        difference = whole(sets, drawn, scorer)
        value = difference.value
        assert value is not None
        assert value.low is not None
        half = (value.value - value.low) / 4
        low, high = value.value - half, value.value + half
        return replace(difference, value=replace(value, low=low, high=high))

    monkeypatch.setattr(seeds, "between", narrow)
    with pytest.raises(AssertionError, match="splits have a verdict, expected at most 10%"):
        seeds.share_of_verdicts(sets, "demo-acc", SPLITS)
