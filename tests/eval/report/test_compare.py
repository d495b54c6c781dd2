"""What differs between two sets, and by how much."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.errors import BadScores
from eval.prompts.prompts import Prompts
from eval.report.compare import compare
from eval.report.entries import ScoredSet, open_all, open_one
from eval.report.pairing import pairing_of, subject_of
from eval.report.report import report
from eval.scores import results
from eval.scores.aggregate import aggregate
from eval.scores.results import Item, Value
from shards import seal
from tests.eval.sets import GROUPS, PROMPTS, VAE, make_items, make_score, make_set, training

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
    assert (comparison.pairing.subject, comparison.pairing.warnings) == ("VAEs", ())
    (difference,) = comparison.differences
    assert difference.value is not None
    assert difference.value.value == pytest.approx(100 * (b - a).mean())
    within = [(b - a)[i::3].std() for i in range(3)]  # resampled within groups of ten
    error = 100 * np.sqrt(np.mean(np.square(within)) / N)
    assert difference.value.low == pytest.approx(
        difference.value.value - 1.96 * error, abs=0.3 * error
    )
    assert difference.value.high == pytest.approx(
        difference.value.value + 1.96 * error, abs=0.3 * error
    )
    assert (difference.resolved, difference.share) == (True, 1.0)
    for i, group in enumerate(GROUPS):
        assert difference.groups[group].value == pytest.approx(100 * (b - a)[i::3].mean())


def test_a_difference_inside_its_interval_is_not_resolved(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, N)
    for name, values in (("a", np.zeros(N)), ("b", noise - noise.mean() + 0.02)):
        make_score(make_set(tmp_path / name, {"weights": name * 64}), "clip", make_items(values))
    (difference,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert difference.value is not None
    assert difference.value.value == pytest.approx(0.02)
    assert difference.resolved is False
    assert difference.share is not None
    assert 0.4 < difference.share < 0.7  # little more often above 0 than below


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
    assert subject_of({"seed": (1, 2)}) == (
        "seed",
        ["not a paired comparison: seed differs (1, 2)"],
    )
    name, warnings = subject_of({key: (1, 2) for key in differ})
    assert name == subject
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
        make_score(folder, "places", make_items(values), made_by={"model": folder.name})
        path = results.NAME + "/wrong.items.jsonl"
        make_score(folder, "wrong", make_items(values))
    lines = (b / path).read_text().splitlines(keepends=True)
    (b / path).write_text("".join(lines[1:]))
    differences = {d.scorer: d for d in compare(*open_all([a, b])).differences}
    assert sorted(differences) == ["half", "places", "versions", "ways", "wrong"]
    assert differences["places"].warnings == ()  # of the same weights, as the score's name says
    assert "b has no items" in (differences["half"].reason or "")
    assert "in different ways" in (differences["ways"].reason or "")
    assert "items of b do not add up" in (differences["wrong"].reason or "")
    assert differences["versions"].warnings == ("scored differently: torch",)
    assert differences["versions"].resolved is False


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    fewer = Prompts("bench", PROMPTS.items[:20])
    a, b = make_set(tmp_path / "a"), make_set(tmp_path / "b", prompts=fewer)
    make_score(a, "clip", make_items(np.ones(N)))
    make_score(b, "clip", make_items(np.ones(20), fewer))
    comparison = compare(*open_all([a, b]))
    assert "prompts differs" in comparison.pairing.warnings[0]
    assert comparison.differences[0].reason == "it is of other prompts in each"


def test_other_texts_under_the_same_ids_are_not_paired(tmp_path: Path) -> None:
    other = Prompts("bench", tuple(replace(p, text=f"{p.text}, in oil") for p in PROMPTS.items))
    for name, prompts in (("a", PROMPTS), ("b", other)):
        make_score(
            make_set(tmp_path / name, prompts=prompts), "clip", make_items(np.ones(N), prompts)
        )
    (difference,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert (difference.value, difference.reason) == (None, "it is of other prompts in each")


def test_reconstructions_of_other_originals_are_warned_of(tmp_path: Path) -> None:
    for name, resolution in (("a", 256), ("b", 512), ("c", 256)):
        how = {"kind": "original", "preprocess": {"resolution": resolution}}
        make_set(tmp_path / name / "original", how)
        make_set(tmp_path / name / "reconstruction", {"kind": "reconstruction", "vae": name * 64})
    a, b, c = open_all([tmp_path / name for name in "abc"])
    assert compare(a, b).pairing.warnings == ("of other originals: preprocess differs",)
    assert compare(a, c).pairing.warnings == ()


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
    (difference,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert difference.value is not None
    assert difference.value.value == pytest.approx(0.75)


def test_a_group_that_is_not_made_of_items_values_has_no_difference(tmp_path: Path) -> None:
    """As of DPG-Bench, whose categories count answers that its score does not."""
    for name in ("a", "b"):
        folder, items = make_set(tmp_path / name), make_items(np.linspace(0, 1, N))
        groups = dict(aggregate(items)[1])
        groups["colors"] = Value(0.99, 0.9, 1.0, 10)
        make_score(folder, "dpg", items, groups=groups)
    (difference,) = compare(*open_all([tmp_path / "a", tmp_path / "b"])).differences
    assert sorted(difference.groups) == ["counting", "position"]


# Trainings -----------------------------------------------------------------------------------------------------------


def sets_of(folder: Path, *trainings: dict[str, Any] | None, **differ: Any) -> list[ScoredSet]:
    """Sets of other VAEs and weights, whose trainings differ from the first by these leaves; None: not recorded."""
    random = np.random.default_rng(0)
    for i, changes in enumerate(trainings):
        settings = {"vae": "ac"[i] * 64, "weights": str(i) * 64} | (differ if i else {})
        trained = None if changes is None else training(changes)
        made = make_set(folder / f"{i}", settings, seed=i, trained=trained)
        make_score(made, "clip", make_items(random.normal(i, 0.1, N)))
    return open_all([folder / f"{i}" for i in range(len(trainings))])


def test_vaes_alone_are_claimed_only_where_the_trainings_are_the_same(tmp_path: Path) -> None:
    pairing = compare(*sets_of(tmp_path, {}, VAE)).pairing
    assert pairing.sentence == "Compares VAEs, on the prompts that both share."
    assert (pairing.paired, pairing.warnings) == (True, ())
    assert pairing.training is not None
    assert pairing.training.beside == {}
    assert pairing.training.follow["model.in_channels"] == (4, 16)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("data.sources.0.latents.encoder.precision", "bf16-autocast"),
        ("model.layers", 2),
        ("model.patch_size", 1),
        ("optim.lr", 1e-5),
        ("optim.schedule", "cosine"),
        ("ema.decay", 0.5),
        ("flow.weighting", "mode"),
        ("caption_dropout", 0.0),
        ("deepspeed", "zero2.json"),
        ("global_batch", 64),
        ("steps_planned", 10),
        ("step", 200),
        ("position", 6400),
        ("order.lanes", 16),
        ("order.window", 64),
        ("order.weights", [0.5, 0.5]),
        ("order.valid_rows", ["2" * 64]),
        ("init", {"path": "x"}),
        ("data.sources.0.text.encoder.weights", "d" * 64),
        ("data.sources.0.latents.preprocess", {"crop": 1}),
        ("changes", [{"step": 5, "optim.lr": [1, 2]}]),
        ("data.rates", [1.0]),
        ("data.text_encoder", "x"),
    ],
)
def test_each_other_difference_is_named(tmp_path: Path, leaf: str, value: Any) -> None:
    comparison = compare(*sets_of(tmp_path, {}, VAE | {leaf: value}))
    assert comparison.pairing.subject == "VAEs"
    assert comparison.pairing.paired is False
    (warning,) = comparison.pairing.warnings
    assert warning.startswith("not a paired comparison of VAEs alone: ")
    assert f"{leaf}" in warning
    assert comparison.pairing.sentence == "Compares sets that differ in more than VAEs."


def test_pictures_that_another_vae_decoded_than_the_models_own_are_no_paired_comparison(
    tmp_path: Path,
) -> None:
    """As `--vae` with `--allow-other-encoder` makes them: of the same weights, and of those of another VAE."""
    first, *others = sets_of(tmp_path, {}, VAE, vae="d" * 64)
    make_set(tmp_path / "2", {"vae": "c" * 64, "weights": "0" * 64}, trained=training())
    others.append(open_one(tmp_path / "2"))
    for scored, vae in zip(others, "dc", strict=True):
        pairing = pairing_of(first, scored)
        assert pairing.paired is False
        (warning,) = pairing.warnings
        assert warning.startswith(
            f"{scored.name}: decoded by the VAE {vae * 12}, its model was trained on"
        )


def test_another_precision_of_the_decoder_is_no_part_of_the_vae(tmp_path: Path) -> None:
    for name in "ac":
        decoding = {"class": name, "precision": "fp32" if name == "a" else "bf16-autocast"}
        make_set(
            tmp_path / name, {"kind": "reconstruction", "vae": name * 64, "decoding": decoding}
        )
    pairing = pairing_of(*open_all([tmp_path / "a", tmp_path / "c"]))
    assert pairing.paired is False
    assert "decoding differs" in pairing.warnings[0]


def test_averages_and_steps_are_named_too(tmp_path: Path) -> None:
    comparison = compare(
        *sets_of(tmp_path, {}, VAE | {"step": 200, "position": 6400}, ema=False, step=200)
    )
    assert comparison.pairing.paired is False
    for key in ("ema differs (True, False)", "step differs (100, 200)", "position differs"):
        assert key in comparison.pairing.warnings[0]


@pytest.mark.parametrize(
    ("trainings", "words"),
    [
        (({}, None), "how the weights of 1 were trained is not known"),
        ((None, None), "how the weights of 0 and 1 were trained is not known"),
    ],
)
def test_sets_without_a_record_say_so(tmp_path: Path, trainings: Any, words: str) -> None:
    """As sets of before: all that the pictures say is compared, and a verdict is one on the sets."""
    comparison = compare(*sets_of(tmp_path, *trainings))
    assert (comparison.pairing.subject, comparison.pairing.paired, comparison.pairing.training) == (
        "VAEs",
        None,
        None,
    )
    assert comparison.pairing.warnings[0].startswith(words)
    assert "as far as is known" in comparison.pairing.sentence
    assert comparison.favours(comparison.differences[0]) == "1"
    make_set(tmp_path / "2", {"vae": "2" * 64, "weights": "2" * 64}, trained={"step": 100})
    partly = pairing_of(*open_all([tmp_path / "0", tmp_path / "2"]))
    assert partly.paired is None
    assert "not known" in partly.warnings[-1]


def test_a_record_of_other_weights_or_a_damaged_one_counts_for_nothing(tmp_path: Path) -> None:
    first, second = sets_of(tmp_path, {}, VAE)
    shutil.copy(first.folder / "run.json", second.folder / "run.json")
    assert open_one(second.folder).trained is None
    for data in (
        b"",
        b"{}",
        b"[1]",
        (first.folder / "run.json").read_bytes().replace(b"0.0015", b"0.0016"),
    ):
        (first.folder / "run.json").write_bytes(data)
        assert open_one(first.folder).trained is None


@pytest.mark.parametrize(
    "edits",
    [
        {"init": 5}, {"init": []}, {"init": {"training": 5}}, {"init": {"path": []}}, {"seed": []}, {"seed": {}},
        {"seed": -1}, {"seed": True}, {"model": 5}, {"flow": json.loads("[" * 400 + "]" * 400)},
        {"init": json.loads('{"training":{"init":' * 200 + "null" + "}}" * 200)},
    ],
)  # fmt: skip
def test_an_edited_record_counts_for_nothing(tmp_path: Path, edits: dict[str, Any]) -> None:
    """Also one with a digest that fits: it comes from strangers, as the set does."""
    first, second = sets_of(tmp_path, {}, VAE)
    path = second.folder / "run.json"
    record = json.loads(path.read_bytes())
    del record["digest"]
    record["training"] |= edits
    path.write_bytes(seal(record))
    report([first.folder, second.folder], tmp_path / "r.html")
    assert open_one(second.folder).trained is None
    path.write_bytes(seal({**record, "training": training(), "initial_share": "9" * 400}))
    assert open_one(second.folder).trained is None  # no infinity in the JSON


def test_the_subject_is_what_the_trainings_differ_in(tmp_path: Path) -> None:
    """Of one VAE: the one value, the steps, or, of several, none alone."""
    for i, (changes, subject, paired) in enumerate(
        [
            ({"optim.lr": 1e-5}, "optim.lr", True),
            ({"step": 200, "position": 6400}, "steps", True),
            ({"optim.lr": 1e-5, "model.layers": 2}, "weights", False),
            ({"optim.lr": 1e-5, "step": 200, "position": 6400}, "weights", False),
            ({}, "weights", True),
        ]
    ):
        sets = sets_of(tmp_path / str(i), {}, changes, vae="a" * 64, step=changes.get("step", 100))
        comparison = compare(*sets).pairing
        assert (comparison.subject, comparison.paired) == (subject, paired)
