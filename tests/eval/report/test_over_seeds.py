"""Entries of several training seeds: how they are paired, and what their differences say together."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from eval.distances import influences
from eval.distances.influences import Influence
from eval.prompts.prompts import Prompts
from eval.report.compare import Entry, compare, entries, mean_over_seeds
from eval.report.entries import ScoredSet, open_all, open_one
from eval.scores import results
from eval.scores.seeds import holm
from tests.eval.sets import GROUPS, PROMPTS, make_items, make_score, make_set, seeded, training

N = len(PROMPTS.items)


def opened(folder: Path, seeds: dict[str, tuple[int, ...]]) -> list[ScoredSet]:
    return open_all(seeded(folder, seeds))


def test_seeds_of_an_entry_are_never_compared_with_each_other(tmp_path: Path) -> None:
    sets = opened(tmp_path, {"flux": (0, 1, 2), "e2e": (2, 0, 1)})
    a, b = entries(sets)
    assert (a.name, list(a.members), b.name, list(b.members)) == (
        "flux",
        [0, 1, 2],
        "e2e",
        [2, 0, 1],
    )
    comparison = compare(a, b)
    assert (comparison.seeds, comparison.pairing.subject, comparison.pairing.paired) == (
        (0, 1, 2),
        "VAEs",
        True,
    )
    (difference,) = comparison.differences
    means = {
        seed: float(np.mean([i.value for i in b.members[seed].items("clip")]))
        - float(np.mean([i.value for i in a.members[seed].items("clip")]))
        for seed in comparison.seeds
    }
    assert {s: v.value for s, v in difference.by_seed.items()} == pytest.approx(means)
    # by hand, from the 3 x 30 differences of prompts: ten prompts in each of three groups
    d = np.array([
        [y.value - x.value for x, y in zip(a.members[s].items("clip"), b.members[s].items("clip"), strict=True)]
        for s in comparison.seeds
    ])  # fmt: skip
    of_seeds = d.mean(1).var(ddof=1) / 3
    of_prompts = np.mean([d.mean(0)[g::3].var(ddof=1) for g in range(3)]) / 30
    rest = [
        d[:, g::3] - d[:, g::3].mean(0) - d[:, g::3].mean(1)[:, None] + d[:, g::3].mean()
        for g in range(3)
    ]
    residual = np.mean([np.square(r).sum() / (2 * 9) for r in rest]) / (3 * 30)
    assert difference.value is not None
    assert difference.parts is not None
    parts = difference.parts
    assert (parts.count, parts.seeds, parts.prompts, parts.residual) == pytest.approx(
        (3, of_seeds, of_prompts, residual)
    )
    half = np.sqrt(4.3026527**2 * of_seeds + 1.959964**2 * max(0, of_prompts - residual))
    assert (difference.value.value, difference.value.low, difference.value.high) == pytest.approx(
        (d.mean(), d.mean() - half, d.mean() + half)
    )
    assert difference.p is not None
    assert difference.p < 0.05
    assert difference.covers_seeds
    assert difference.share is None
    assert comparison.favours(difference) == "e2e"
    assert difference.groups.keys() == set(GROUPS)
    assert entries(sets[:3])[0].members.keys() == {0, 1, 2}
    assert len(entries(sets[:3])) == 1


def test_two_seeds_have_an_interval_and_no_verdict(tmp_path: Path) -> None:
    comparison = compare(*entries(opened(tmp_path, {"flux": (0, 1), "e2e": (0, 1)})))
    (difference,) = comparison.differences
    assert difference.value is not None
    assert difference.value.low is not None
    assert (list(difference.by_seed), difference.p) == ([0, 1], None)
    assert comparison.favours(difference) is None
    assert comparison.no_verdict(difference) == "2 training seeds are too few, 3 are the least"


def test_a_verdict_takes_the_adjusted_level_too(tmp_path: Path) -> None:
    comparison = compare(*entries(opened(tmp_path, {"flux": (0, 1, 2), "e2e": (0, 1, 2)})))
    (difference,) = comparison.differences
    adjusted = holm({"e2e": difference.p, "other": 0.2})["e2e"]
    assert adjusted == pytest.approx(2 * (difference.p or 0))
    assert comparison.favours(difference, adjusted) == "e2e"
    assert comparison.favours(difference, 0.06) is None


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
def test_identical_entries_differ_by_exactly_0(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    """Under two names, of the same seeds: items, and a distance with its influences."""
    random = np.random.default_rng(4)
    members: dict[str, dict[int | None, ScoredSet]] = {"a": {}, "b": {}}
    for seed in seeds:
        values, shares = random.normal(size=(2, N))
        for name in members:
            folder = make_set(tmp_path / name / f"{seed}", trained=training({"seed": seed}))
            make_score(folder, "clip", make_items(values), unit=100.0)
            score = make_score(
                folder, "fd", value=float(seed), better="lower", made_by={"metric": "fid"}
            )
            each = [
                Influence(p.id, 0, float(share - shares.mean()), p.group)
                for p, share in zip(PROMPTS.items, shares, strict=True)
            ]
            influences.write(folder, "fd", score.images, each)
            members[name][seed] = open_one(folder)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        comparison = compare(Entry("a", members["a"]), Entry("b", members["b"]))
    assert [difference.scorer for difference in comparison.differences] == ["clip", "fd"]
    for difference in comparison.differences:
        assert difference.reason is None
        for value in (difference.value, *difference.by_seed.values(), *difference.groups.values()):
            assert value is not None
            assert (value.value, value.low, value.high) == (0, 0, 0)
        assert difference.p == (None if len(seeds) == 2 else 1)
        assert (difference.resolved, difference.identical) == (False, True)
        assert comparison.favours(difference) is None


def test_seeds_of_other_prompts_have_no_mean(tmp_path: Path) -> None:
    """As of a study whose sets were made of another list of prompts in one seed."""
    few = Prompts("bench", PROMPTS.items[:20])
    members: dict[str, dict[int | None, ScoredSet]] = {"a": {}, "b": {}}
    for name in members:
        for seed, prompts in enumerate((PROMPTS, few, PROMPTS)):
            folder = make_set(
                tmp_path / name / f"{seed}", prompts=prompts, trained=training({"seed": seed})
            )
            values = np.linspace(0, 1, len(prompts.items)) + (name == "b")
            make_score(folder, "clip", make_items(values, prompts))
            members[name][seed] = open_one(folder)
    (difference,) = compare(Entry("a", members["a"]), Entry("b", members["b"])).differences
    assert (difference.value, difference.by_seed) == (None, {})
    assert "prompts that are not the same ones" in (difference.reason or "")


def test_the_mean_of_an_entry_is_over_seeds_and_prompts(tmp_path: Path) -> None:
    sets = opened(tmp_path, {"flux": (0, 1, 2), "e2e": ()})
    d = np.array([[item.value for item in scored.items("clip")] for scored in sets])
    value = mean_over_seeds(sets, "clip")
    assert value is not None
    assert value.value == pytest.approx(d.mean())
    alone = 4.3026527 * d.mean(1).std(ddof=1) / np.sqrt(3)
    assert value.high is not None
    assert value.high - value.value > alone
    for scored in sets:  # without items nothing is known of prompts
        (scored.score_folder / results.NAME / "clip.items.jsonl").unlink()
    bare = mean_over_seeds(sets, "clip")
    assert bare is not None
    assert bare.high == pytest.approx(d.mean() + alone)
    assert mean_over_seeds(sets[:1], "clip") == sets[0].scores["clip"].value
    assert mean_over_seeds(sets, "other") is None


def test_a_crossed_pair_has_no_verdict(tmp_path: Path) -> None:
    comparison = compare(*entries(opened(tmp_path, {"flux": (0,), "e2e": (1,)})))
    (difference,) = comparison.differences
    assert (comparison.seeds, difference.resolved, comparison.favours(difference)) == (
        (),
        True,
        None,
    )
    assert "training seed differs (0, 1)" in comparison.pairing.warnings[0]
    assert comparison.pairing.paired is False


def test_seeds_without_a_partner_are_left_out_and_said(tmp_path: Path) -> None:
    sets = opened(tmp_path, {"flux": (0, 1), "e2e": (1, 2)})
    (tmp_path / "e2e-seed1" / results.NAME / "clip.json").rename(tmp_path / "kept")
    comparison = compare(*entries(sets))
    assert comparison.seeds == (1,)
    assert comparison.pairing.warnings == ("left out, for want of a partner: flux, e2e-seed2",)
    assert not comparison.differences[0].covers_seeds
    sets = opened(tmp_path / "none", {"flux": (0, 1), "e2e": (2, 3)})
    comparison = compare(*entries(sets))
    assert (
        comparison.pairing.warnings[-1] == "left out, for want of a partner: flux-seed1, e2e-seed3"
    )
    assert comparison.favours(comparison.differences[0]) is None


def test_a_score_that_some_seeds_lack_says_so(tmp_path: Path) -> None:
    seeded(tmp_path, {"flux": (0, 1, 2), "e2e": (0, 1, 2)})
    (tmp_path / "e2e-seed1" / results.NAME / "clip.json").unlink()
    names = ("flux", "flux-seed1", "flux-seed2", "e2e", "e2e-seed1", "e2e-seed2")
    (difference,) = compare(*entries(open_all([tmp_path / name for name in names]))).differences
    assert list(difference.by_seed) == [0, 2]
    assert difference.warnings == ("of training seed 0, 2 alone: others are not scored",)


def test_sets_that_differ_in_more_than_the_seed_are_no_entry(tmp_path: Path) -> None:
    """Another step, rate or sampling is another entry; another batch size, which moves a rounding, is not."""
    for name, changes, settings in (
        ("a", {}, {}),
        ("b", {"seed": 1, "step": 200}, {"step": 200}),
        ("c", {"seed": 1, "optim.lr": 1.0}, {}),
        ("d", {"seed": 1}, {"guidance_scale": 2.0}),
        ("e", {"seed": 1}, {"batch_size": 64}),
        ("f", {}, {}),
    ):
        make_set(tmp_path / name, {"weights": name * 64} | settings, trained=training(changes))
    groups = entries(open_all([tmp_path / name for name in "abcdef"]))
    assert [[scored.name for scored in entry.members.values()] for entry in groups] == [
        ["a", "e"],
        ["b"],
        ["c"],
        ["d"],
        ["f"],
    ]
