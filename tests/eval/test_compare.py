"""What differs between two sets, and by how much."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import results
from eval.aggregate import aggregate
from eval.compare import compare, judged
from eval.errors import BadScores
from eval.prompts import Prompts
from eval.results import Item, Value
from eval.scored import open_all

from .sets import GROUPS, PROMPTS, make_items, make_score, make_set

N = len(PROMPTS.items)


def test_a_difference_is_the_mean_of_prompts_differences(tmp_path: Path) -> None:
    """Expected by hand: the mean over prompts of b - a, its standard error for the interval, and each group's mean."""
    random = np.random.default_rng(0)
    a = random.normal(0, 1, N)
    b = a + random.normal(0.3, 0.2, N)
    folders = [make_set(tmp_path / "a"), make_set(tmp_path / "b", {"vae": "c" * 64}, seed=1)]
    for folder, values in zip(folders, (a, b), strict=True):
        make_score(folder, "clip", make_items(values), unit=100.0)
    comparison = compare(*open_all(folders))
    assert (comparison.subject, comparison.warnings) == ("VAEs", ())
    (found,) = comparison.differences
    assert found.value is not None
    assert found.value.value == pytest.approx(100 * (b - a).mean())
    within = [(b - a)[i::3].std() for i in range(3)]  # resampled within groups of ten
    error = 100 * np.sqrt(np.mean(np.square(within)) / N)
    assert found.value.low == pytest.approx(found.value.value - 1.96 * error, abs=0.3 * error)
    assert found.value.high == pytest.approx(found.value.value + 1.96 * error, abs=0.3 * error)
    assert (found.resolved, found.share) == (True, 1.0)
    for i, group in enumerate(GROUPS):
        assert found.groups[group].value == pytest.approx(100 * (b - a)[i::3].mean())


def test_a_difference_inside_its_interval_is_not_resolved(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, N)
    for name, values in (("a", np.zeros(N)), ("b", noise - noise.mean() + 0.02)):
        make_score(make_set(tmp_path / name, {"weights": name * 64}), "clip", make_items(values))
    (found,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert found.value is not None
    assert found.value.value == pytest.approx(0.02)
    assert found.resolved is False
    assert found.share is not None
    assert 0.4 < found.share < 0.7  # little more often above 0 than below


@pytest.mark.parametrize(
    ("differ", "subject", "warned"),
    [
        (("vae", "weights"), "VAEs", []),
        (("vae", "weights", "batch_size"), "VAEs", []),
        (("vae", "decoding", "norm"), "VAEs", []),
        (("decoding",), "decoding", []),
        (("vae", "weights", "guidance_scale"), "VAEs", ["guidance_scale"]),
        (("vae", "weights", "step", "seed"), "VAEs", ["seed", "step"]),
        (("weights", "step"), "weights", []),
        (("ema", "weights"), "weights", []),
        (("sampler", "weights"), "weights", ["sampler"]),
        (("guidance_scale",), "guidance_scale", []),
        (("guidance_scale", "sampler"), "several settings", ["guidance_scale", "sampler"]),
        (("column", "vae"), "VAEs", []),
        ((), "equal settings", []),
    ],
)
def test_what_is_compared(differ: tuple[str, ...], subject: str, warned: list[str]) -> None:
    assert judged({"seed": (1, 2)}) == ("seed", ["not a paired comparison: seed differs (1, 2)"])
    found, warnings = judged({key: (1, 2) for key in differ})
    assert found == subject
    if not warned:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith(f"not a paired comparison of {subject} alone: ")
    assert warning.count(" differs (1, 2)") == len(warned)
    assert all(f"{key} differs" in warning for key in warned)


def test_why_there_is_no_difference(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a"), make_set(tmp_path / "b", {"vae": "c" * 64}, seed=1)
    values = np.linspace(0, 1, N)
    make_score(a, "half", make_items(values))
    make_score(b, "half", value=0.5)
    make_score(a, "only-a", make_items(values))
    for folder in (a, b):
        make_score(
            folder, "ways", make_items(values), overall="groups" if folder == a else "prompts"
        )
        make_score(folder, "versions", make_items(values), made_by={"torch": folder.name})
        path = results.NAME + "/wrong.items.jsonl"
        make_score(folder, "wrong", make_items(values))
    lines = (b / path).read_text().splitlines(keepends=True)
    (b / path).write_text("".join(lines[1:]))
    found = {d.scorer: d for d in compare(*open_all([a, b])).differences}
    assert sorted(found) == ["half", "versions", "ways", "wrong"]
    assert "b has no items" in (found["half"].reason or "")
    assert "in different ways" in (found["ways"].reason or "")
    assert "items of b do not add up" in (found["wrong"].reason or "")
    assert found["versions"].warnings == ("scored differently: torch",)
    assert found["versions"].resolved is False


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    fewer = Prompts("bench", PROMPTS.items[:20])
    a, b = make_set(tmp_path / "a"), make_set(tmp_path / "b", prompts=fewer)
    make_score(a, "clip", make_items(np.ones(N)))
    make_score(b, "clip", make_items(np.ones(20), fewer))
    comparison = compare(*open_all([a, b]))
    assert "prompts differs" in comparison.warnings[0]
    assert comparison.differences[0].reason == "it is of other prompts in each"


def test_other_texts_under_the_same_ids_are_not_paired(tmp_path: Path) -> None:
    other = Prompts("bench", tuple(replace(p, text=f"{p.text}, in oil") for p in PROMPTS.items))
    for name, prompts in (("a", PROMPTS), ("b", other)):
        make_score(
            make_set(tmp_path / name, prompts=prompts), "clip", make_items(np.ones(N), prompts)
        )
    (found,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert (found.value, found.reason) == (None, "it is of other prompts in each")


def test_reconstructions_of_other_originals_are_warned_of(tmp_path: Path) -> None:
    for name, resolution in (("a", 256), ("b", 512), ("c", 256)):
        how = {"kind": "original", "preprocess": {"resolution": resolution}}
        make_set(tmp_path / name / "original", how)
        make_set(tmp_path / name / "reconstruction", {"kind": "reconstruction", "vae": name * 64})
    a, b, c = open_all([tmp_path / name for name in "abc"])
    assert compare(a, b).warnings == ("of other originals: preprocess differs",)
    assert compare(a, c).warnings == ()


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"prompt": "000", "number": 0, "value": "high", "groups": [], "found": {}}'],
)
def test_damaged_items_are_named(tmp_path: Path, line: str) -> None:
    for name in ("a", "b"):
        make_score(make_set(tmp_path / name), "clip", make_items(np.ones(N)))
    path = tmp_path / "b" / results.NAME / "clip.items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadScores, match=r"b/scores/clip\.items\.jsonl"):
        compare(*open_all([tmp_path / "a", tmp_path / "b"]))


def test_means_of_groups_weigh_groups_alike(tmp_path: Path) -> None:
    """Two groups of one and of 29 prompts: the difference is the mean of both groups' differences."""
    items_a = [
        Item(p.id, 0, 0.0, ("one" if i == 0 else "rest",)) for i, p in enumerate(PROMPTS.items)
    ]
    items_b = [Item(i.prompt, 0, 1.0 if i.groups == ("one",) else 0.5, i.groups) for i in items_a]
    for name, items in (("a", items_a), ("b", items_b)):
        make_score(make_set(tmp_path / name), "g", items, overall="groups")
    (found,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert found.value is not None
    assert found.value.value == pytest.approx(0.75)


def test_a_group_that_is_not_made_of_items_values_has_no_difference(tmp_path: Path) -> None:
    """As of DPG-Bench, whose categories count answers that its score does not."""
    for name in ("a", "b"):
        folder, items = make_set(tmp_path / name), make_items(np.linspace(0, 1, N))
        groups = dict(aggregate(items)[1])
        groups["colors"] = Value(0.99, 0.9, 1.0, 10)
        make_score(folder, "dpg", items, groups=groups)
    (found,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert sorted(found.groups) == ["counting", "position"]
