"""FDr, MIND, precision and recall as scorers: names, intervals, differences, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.commands import main
from eval.demo.judge import WEIGHTS
from eval.distances.frechet import frechet_features
from eval.distances.influences import Influence, estimate
from eval.distances.measure import difference, measure
from eval.distances.metrics import METRICS, Distance
from eval.distances.neighbours import precision_influence, recall_influence
from eval.distances.references import Reference, read, write
from eval.distances.slices import mind_influence
from eval.errors import BadReference, NotFinite, TooFewImages
from eval.features.features import extract, identity, of_folder, of_set
from eval.images.imageset import ImageSetReader
from eval.report.report import report
from eval.scores import results
from eval.scores.results import Score, Value
from eval.scores.seeds import over_seeds
from tests.eval.small import colours, prompts_of, save_clip, save_folder, save_set

COUNT = 40  # of each set


def halves(real: np.ndarray, validation: np.ndarray) -> Reference:
    def of(label: str, features: np.ndarray) -> Reference:
        names = tuple(f"{label}{i}" for i in range(len(features)))
        return Reference(label, {"source": label}, features, (None,) * len(names), names)

    return of("real", real).beside(of("other", validation))


def interval(distance: Distance) -> Value:
    shares = [Influence(f"{i}", 0, float(share)) for i, share in enumerate(distance.influence)]
    return over_seeds([estimate(distance.value, shares, None, distance.subsets)])[0]


# On features --------------------------------------------------------------------------------------


def test_fdr_of_real_pictures_is_1_within_its_interval() -> None:
    """About 95 % of draws hold it, 57 here; and of pictures that vary more it is larger."""
    generator = np.random.default_rng(5)
    deviation = 1 / np.arange(1, 17) ** 0.75

    def draw(count: int, scale: float = 1.0) -> np.ndarray:
        return (generator.normal(size=(count, 16)) * deviation * scale).astype(np.float32)

    holds, worse = 0, 0
    for _ in range(60):
        reference = halves(draw(600), draw(200))
        value = interval(METRICS["fdr"].distance(draw(200), reference, False))
        assert value.low is not None
        assert value.high is not None
        holds += value.low <= 1 <= value.high
        far = interval(METRICS["fdr"].distance(draw(200, 1.6), reference, False))
        assert far.low is not None
        worse += far.low > 1
    assert holds >= 54
    assert worse >= 50


def test_the_denominator_is_of_as_many_pictures_and_part_of_the_interval() -> None:
    generator = np.random.default_rng(2)
    x, real = generator.normal(0.3, 1.2, (50, 4)), generator.normal(size=(200, 4))
    validation = generator.normal(0.2, 1.1, (90, 4))
    reference = halves(real, validation)
    actual = METRICS["fdr"].distance(x, reference, False)
    chosen = np.sort(np.random.RandomState(0).permutation(90)[:50])
    below = frechet_features(validation[chosen], real)
    assert actual.value == pytest.approx(frechet_features(x, real) / below, rel=1e-10)
    assert actual.made_by["validation_pictures"] == 50
    assert np.mean(actual.subsets) == pytest.approx(actual.value, rel=1e-10)
    # other validation halves, drawn from the same distribution, move it as far as the subsets say
    parts = np.std(actual.subsets, ddof=1) / np.sqrt(len(actual.subsets))
    ratios = [
        frechet_features(x, real) / frechet_features(generator.normal(0.2, 1.1, (50, 4)), real)
        for _ in range(300)
    ]
    # a ratio is skewed: its denominator's spread is compared
    assert 0.5 < parts / actual.value / np.std(np.log(ratios), ddof=1) < 2


def test_a_difference_of_two_sets_leaves_the_denominator_out() -> None:
    generator = np.random.default_rng(3)
    reference = halves(generator.normal(size=(200, 4)), generator.normal(size=(90, 4)))
    a = generator.normal(0.5, 1.2, (60, 4))
    distances = [METRICS["fdr"].distance(x, reference, False) for x in (a, a + 0.001)]
    wide = [interval(distance) for distance in distances]
    estimates = [
        estimate(
            d.value,
            [Influence(f"{i}", 0, float(share)) for i, share in enumerate(d.influence)],
            None,
            d.subsets,
        )
        for d in distances
    ]
    apart = over_seeds([estimates[1] - estimates[0]])[0]
    assert apart.value == pytest.approx(distances[1].value - distances[0].value)
    assert apart.high is not None
    assert apart.low is not None
    assert wide[0].high is not None
    assert wide[0].low is not None
    assert (apart.high - apart.low) < 0.01 * (wide[0].high - wide[0].low)


def test_real_pictures_are_drawn_to_the_number_of_generated_ones() -> None:
    generator = np.random.default_rng(4)
    x, real = generator.normal(size=(20, 3)), generator.normal(size=(70, 3))
    reference = Reference("", {}, real, (None,) * 70)
    chosen = real[np.sort(np.random.RandomState(0).permutation(70)[:20])]
    for kind, influence in (
        ("mind", mind_influence), ("precision", precision_influence), ("recall", recall_influence),
    ):  # fmt: skip
        actual = METRICS[kind].distance(x, reference, False)
        value, influences = influence(x, chosen)
        assert actual.value == value
        assert actual.against == 20
        np.testing.assert_array_equal(actual.influence, influences)


def test_mind_of_a_paired_reference_counts_both_sides() -> None:
    """Known Gaussians, and what a VAE might make of them: the error is the one that other draws show."""
    generator, count = np.random.default_rng(6), 80
    values, errors = [], []
    for _ in range(80):
        y = generator.normal(1, 1, (count, 5))
        x = 0.9 * y + 0.3 + generator.normal(0, 0.1, (count, 5))
        actual = METRICS["mind"].distance(x, Reference("", {}, y, (None,) * count), True)
        values.append(actual.value)
        errors.append(actual.influence.std(ddof=1) / np.sqrt(count))
    assert 0.7 < np.mean(errors) / np.std(values, ddof=1) < 1.35


def test_what_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    """As of a network that maps every picture to 0, which has no direction."""
    images = ImageSetReader.open(save_set(tmp_path, prompts_of(6)))
    network = replace(colours(), features=lambda pixels: torch.zeros(len(pixels), 48))
    real = np.random.default_rng(0).normal(size=(6, 48)).astype(np.float32)
    record = identity(network, "none") | {"source": "s", "count": 6}
    with pytest.raises(NotFinite, match="found NaN or infinity as cmmd of its features"):
        measure("cmmd", images, network, Reference("r", record, real, (None,) * 6))
    assert not (tmp_path / "scores").exists()


# As scorers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets a and b of 40 pictures, and two folders of 60 and 45 real pictures."""
    folder, prompts = tmp_path_factory.mktemp("relative"), prompts_of(COUNT)
    save_set(folder / "a", prompts, 1)
    save_set(folder / "b", prompts, 2)
    save_folder(folder / "real", 60, 7)
    save_folder(folder / "other", 45, 8)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def run(place: Path, kind: str, *words: str, sets: Sequence[str] = ("a", "b")) -> None:
    folders = [str(place / name) for name in sets]
    main(["score", kind, *folders, "--reference", str(place / "real"), "--device", "cpu", *words])


def score_of(folder: Path, kind: str) -> Score:
    (score,) = (s for s in results.read_all(folder).values() if s.made_by["metric"] == kind)
    return score


def test_scores_and_their_report(place: Path) -> None:
    network = METRICS["demo-fd"].load(WEIGHTS, "cpu")
    real, other = (extract(of_folder(place / name), network) for name in ("real", "other"))
    a = extract(of_set(ImageSetReader.open(place / "a")), network)
    for kind in ("demo-mind", "demo-precision", "demo-recall"):
        run(place, kind)
    run(place, "demo-fdr", "--validation", str(place / "other"))
    drawn, validation = (
        f[np.sort(np.random.RandomState(0).permutation(len(f))[:COUNT])] for f in (real, other)
    )
    expected = {
        "demo-mind": (mind_influence(a, drawn)[0], "lower"),
        "demo-precision": (precision_influence(a, drawn)[0], "higher"),
        "demo-recall": (recall_influence(a, drawn)[0], "higher"),
        "demo-fdr": (frechet_features(a, real) / frechet_features(validation, real), "lower"),
    }
    data = report([place / "a", place / "b"], place / "report.html")
    differences = {d["scorer"]: d for d in data["sections"][0]["comparisons"][0]["differences"]}
    for kind, (value, better) in expected.items():
        score = score_of(place / "a", kind)
        assert score.value.value == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert score.better == better
        assert score.scorer.startswith(f"{kind}-tiny-real-")
        assert score.scorer.endswith(f"-{COUNT}")  # never set beside one of another number
        apart, _ = difference(place / "a", place / "b", score.scorer)
        assert apart.low is not None
        assert differences[score.scorer]["value"]["value"] == apart.value
        assert differences[score.scorer]["better"] == better
        assert not differences[score.scorer]["warnings"]
    mind = score_of(place / "a", "demo-mind")
    assert (mind.made_by["directions"], mind.made_by["directions_seed"]) == (1_000, 0)
    assert mind.notes[0] == "40 pictures against 40"
    fdr = score_of(place / "a", "demo-fdr")
    assert fdr.made_by["validation_label"] == "other"
    assert fdr.notes[0] == "40 pictures against 60"


def test_groups_are_relative_to_theirs(tmp_path: Path) -> None:
    """Of each group with as many validation pictures as the set has of it: 20."""
    save_set(tmp_path / "a", prompts_of(40, groups=True), 1)
    save_folder(tmp_path / "real", 80, 7, ("x", "y"))
    save_folder(tmp_path / "both", 63, 8, ("x", "x", "y"))
    save_folder(tmp_path / "most", 57, 8, ("x", "x", "y"))
    for name, groups in (("both", {"x", "y"}), ("most", {"x"})):  # y has 21, then 19
        run(tmp_path, "demo-fdr", "--validation", str(tmp_path / name), "--allow-few", sets=["a"])
        (score,) = (
            s
            for s in results.read_all(tmp_path / "a").values()
            if s.made_by["validation_label"] == name
        )
        assert set(score.groups) == groups
        assert score.groups["x"].low is not None


def test_halves_that_are_none(place: Path, clip_folder: Path, tmp_path: Path) -> None:
    gone = "gone"  # nothing of a set is read before the halves are known to be good
    files = {}
    for name, folder, crop in (
        ("real", "real", "none"), ("other", "other", "none"), ("cut", "other", "cc16-box"),
    ):  # fmt: skip
        files[name] = tmp_path / f"{name}.safetensors"
        words = ["score", "reference", str(place / folder), "--out", str(files[name])]
        main([*words, "--of", "demo-fdr", "--crop", crop, "--device", "cpu"])
    clip = tmp_path / "clip.safetensors"
    words = ["score", "reference", str(place / "other"), "--out", str(clip), "--of", "clip-fdr"]
    main([*words, "--model", str(clip_folder), "--device", "cpu"])

    overlap = tmp_path / "overlap"
    shutil.copytree(place / "other", overlap)
    for i in range(3):
        shutil.copy(place / f"real/{i:03d}.png", overlap / f"again{i}.png")
    nameless = tmp_path / "nameless.safetensors"
    write(replace(read(files["other"]), pictures=()), nameless)
    for validation, problem in (
        (overlap, "overlap: 3 of its 48 pictures are in the reference too"),
        (place / "real", "real: 60 of its 60 pictures"),
        (files["real"], "60 of its 60 pictures"),
        (files["cut"], "cut.safetensors: made with the crop cc16-box, expected none as of"),
        (clip, "clip.safetensors: made by another network than is to score"),
        (tmp_path / "none", "none: no such file"),
        (nameless, "nameless.safetensors: found no digests"),
    ):
        with pytest.raises(BadReference, match=problem) as error:
            run(place, "demo-fdr", "--validation", str(validation), sets=[gone])
        assert error.value.exit_code == 2
    with pytest.raises(BadReference, match=r"found --crop cc16-box"):
        main([
            "score", "demo-fdr", gone, "--reference", str(files["real"]), "--crop", "cc16-box",
            "--validation", str(files["other"]),
        ])  # fmt: skip
    copies = tmp_path / "copies.safetensors"  # other files that hold the same pictures
    write(replace(read(files["real"]), label="copies", pictures=("0" * 64,) * 60), copies)
    images = str(save_set(tmp_path / "all", prompts_of(60), 3))
    with pytest.raises(BadReference, match="copies: at the distance"):
        main([
            "score", "demo-fdr", images, "--reference", str(files["real"]), "--validation", str(copies),
            "--device", "cpu",
        ])  # fmt: skip


def test_too_few_pictures(place: Path, tmp_path: Path) -> None:
    few = str(save_folder(tmp_path / "few", 34, 9))
    with pytest.raises(TooFewImages, match="few: found 34 pictures, expected at least the 40 of"):
        run(place, "demo-fdr", "--validation", few)
    tiny = str(save_folder(tmp_path / "tiny", 12, 9))
    with pytest.raises(TooFewImages, match="tiny: found 12 pictures, expected at least 33"):
        run(place, "demo-fdr", "--validation", tiny)
    save_set(tmp_path / "four", prompts_of(4), 1)
    shutil.copytree(place / "real", tmp_path / "real")
    for words in ([], ["--allow-few"]):  # whatever is allowed: each needs its neighbours
        for kind in ("demo-precision", "demo-recall"):
            with pytest.raises(TooFewImages, match="four: found 4 pictures, expected at least 5"):
                run(tmp_path, kind, *words, sets=["four"])
    assert not (tmp_path / "four/scores").exists()
    run(tmp_path, "demo-mind", sets=["four"])
    assert score_of(tmp_path / "four", "demo-mind").scorer.endswith("-4")
    with pytest.raises(TooFewImages):
        run(tmp_path, "demo-fdr", "--validation", str(place / "other"), sets=["four"])
    run(tmp_path, "demo-fdr", "--validation", str(place / "other"), "--allow-few", sets=["four"])
    assert score_of(tmp_path / "four", "demo-fdr").scorer.endswith("-few-4")
    assert json.loads((tmp_path / "four/manifest.json").read_text())["complete"]
