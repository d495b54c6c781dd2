"""Sets of pictures against references, from the command line to the score's file; paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from eval.commands import main
from eval.distances import influences
from eval.distances.frechet import frechet_features
from eval.distances.influences import Influence, estimate, strata_of, totals
from eval.distances.kernels import cmmd_influence, kid_features
from eval.distances.measure import difference
from eval.distances.metrics import METRICS
from eval.distances.references import Reference, read
from eval.errors import (
    BadPicture,
    BadReference,
    BadScores,
    MissingImages,
    MissingWeights,
    OtherImages,
    TooFewImages,
)
from eval.features.features import extract, of_folder, of_set
from eval.features.networks import Clip
from eval.images.imageset import ImageSetReader
from eval.scores import results
from eval.scores.results import Score, Value
from eval.scores.seeds import over_seeds
from shards import sha256_file
from tests.eval.small import prompts_of, save_clip, save_folder, save_inception, save_set

Command = Callable[..., None]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of group x and 40 of group y."""
    return save_folder(tmp_path_factory.mktemp("pictures") / "real", 80, 7, ("x", "y"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets of 60 pictures of the same prompts."""
    folder, prompts = tmp_path_factory.mktemp("sets"), prompts_of(60, groups=True)
    return save_set(folder / "a", prompts, 1), save_set(folder / "b", prompts, 2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, real: Path, clip_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("references") / "real.safetensors"
    words = [
        "score",
        "reference",
        str(real),
        "--out",
        str(out),
        "--of",
        "clip-fid",
        "--crop",
        "cc32-lanczos",
    ]
    main([*words, "--model", str(clip_folder), "--label", "photos", "--device", "cpu"])
    return out


@pytest.fixture(scope="module")
def scored(sets: tuple[Path, Path], reference: Path, clip_folder: Path) -> tuple[Score, Score]:
    words = ["score", "clip-fid", *map(str, sets), "--reference", str(reference)]
    main([*words, "--model", str(clip_folder), "--device", "cpu"])
    first, second = (list(results.read_all(folder).values()) for folder in sets)
    assert len(first) == len(second) == 1
    return first[0], second[0]


def test_a_reference_is_known_by_its_digest(
    real: Path, reference: Path, clip_folder: Path, tmp_path: Path
) -> None:
    actual, network = read(reference), Clip(str(clip_folder)).network("short-bicubic")
    features = extract(of_folder(real), network, "cc32-lanczos")
    assert np.array_equal(actual.features, features)
    np.testing.assert_allclose(
        actual.gaussian.covariance, np.cov(features.astype(float), rowvar=False), atol=1e-9
    )
    with safe_open(reference, "numpy") as file:
        assert {"features", "mean", "covariance", "groups", "pictures"} == set(file.keys())
        assert file.get_tensor("mean").dtype == file.get_tensor("covariance").dtype == np.float64
    assert actual.record == {
        "network": "clip-vit-16-14-28", "weights": network.weights, "resize": "short28-bicubic", "crop": "cc32-lanczos",
        "source": of_folder(real).digest, "count": 80,
    }  # fmt: skip
    assert actual.pictures == tuple(of_folder(real).digests)
    assert actual.name == f"photos-{actual.digest[:8]}"
    assert {g: actual.groups.count(g) for g in ("x", "y")} == {"x": 40, "y": 40}
    assert not list(reference.parent.glob(".*"))  # the blocks of the pass are gone
    words = ["score", "reference", str(real), "--of", "clip-fid", "--model", str(clip_folder)]
    with pytest.raises(BadReference, match="exists already"):
        main([*words, "--out", str(reference)])
    main([*words, "--out", str(tmp_path / "other.safetensors")])
    assert read(tmp_path / "other.safetensors").name.startswith("real-")
    assert read(tmp_path / "other.safetensors").digest != actual.digest  # another crop


def test_values_intervals_and_groups(
    scored: tuple[Score, Score], sets: tuple[Path, Path], reference: Path, clip_folder: Path
) -> None:
    score, real = scored[0], read(reference)
    assert score.scorer == f"clip-fid-vit-16-14-28-tiny-photos-{real.digest[:8]}"
    features = extract(
        of_set(ImageSetReader.open(sets[0])),
        Clip(str(clip_folder)).network("short-bicubic"),
        "cc32-lanczos",
    )
    assert score.value.value == pytest.approx(frechet_features(features, real.features), rel=1e-6)
    for i, group in enumerate(("x", "y")):
        at = [j for j, name in enumerate(real.groups) if name == group]
        expected = frechet_features(features[i::2], real.features[at])
        assert score.groups[group].value == pytest.approx(expected, rel=1e-6)
        assert score.groups[group].count == 30
    assert score.value.low is not None
    assert score.value.low < score.value.value < score.value.high
    assert (score.prompts, score.pictures, score.better, score.benchmark) == (
        60,
        60,
        "lower",
        "tiny",
    )
    assert score.images == ImageSetReader.open(sets[0]).digest
    assert score.made_by["reference"] == real.digest
    assert any("groups are fewer pictures" in note for note in score.notes)


def test_a_difference_is_paired_by_prompts(
    scored: tuple[Score, Score], sets: tuple[Path, Path]
) -> None:
    a, b = scored
    apart, groups = difference(*sets, a.scorer)
    assert apart.value == pytest.approx(b.value.value - a.value.value)
    assert set(groups) == {"x", "y"}
    assert groups["x"].value == pytest.approx(b.groups["x"].value - a.groups["x"].value)
    each = [
        influences.read(folder, a.scorer, score.images)
        for folder, score in zip(sets, scored, strict=True)
    ]
    parts = np.array([(q.all - p.all) / 60 for p, q in zip(*each, strict=True)])
    variance = sum(
        30 * parts[i::2].var(ddof=1) for i in range(2)
    )  # prompts were drawn within x and y
    assert apart.high - apart.value == pytest.approx(1.959964 * np.sqrt(variance))
    own = np.array([(q.own - p.own) / 30 for p, q in zip(*each, strict=True)])[::2]
    assert groups["x"].value - groups["x"].low == pytest.approx(
        1.959964 * np.sqrt(30 * own.var(ddof=1))
    )
    same, _ = difference(sets[0], sets[0], a.scorer)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_only_sets_of_the_same_prompts_and_reference_are_compared(
    scored: tuple[Score, Score], sets: tuple[Path, Path], tmp_path: Path
) -> None:
    name = scored[0].scorer
    with pytest.raises(BadScores):
        difference(sets[0], sets[1], "fid-clean-none")
    for change, what in (
        ({"prompt_list": "other"}, "another prompts"),
        ({"made_by": scored[0].made_by | {"reference": "other"}}, "another reference"),
    ):
        other = tmp_path / what
        results.write(
            other,
            Score(**{f: getattr(scored[0], f) for f in scored[0].__dataclass_fields__} | change),
        )
        with pytest.raises(OtherImages, match=what):
            difference(sets[0], other, name)
    path = influences.path_of(sets[1], name)
    whole = path.read_bytes()
    for damaged in (b"", whole.replace(b"images", b"other"), b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(BadScores, match="Score the set again"):
            difference(*sets, name)
    path.write_bytes(whole)


def test_sets_of_different_numbers_of_pictures_are_compared_by_kid_alone(tmp_path: Path) -> None:
    """Fewer pictures alone have a larger Frechet distance; KID has no such bias, and is paired by prompts anyway."""

    def scored_set(folder: Path, numbers: list[int], metric: str) -> Path:
        each = [
            Influence(prompt, k, 1.0 + i) for i, prompt in enumerate(("p", "q")) for k in numbers
        ]
        influences.write(folder, "s", "digest", each)
        made_by = {"reference": "r", "metric": metric, "subsets": {}}
        results.write(folder, Score(
            scorer="s", benchmark="b", value=Value(float(len(numbers))), better="lower", prompts=2,
            pictures=len(each), images="digest", prompt_list="same", made_by=made_by,
        ))  # fmt: skip
        return folder

    four, item = (scored_set(tmp_path / f"fid{n}", list(range(n)), "fid") for n in (4, 1))
    with pytest.raises(OtherImages, match="of 8 and of 2 pictures, 2 of them of the same prompt"):
        difference(four, item, "s")
    other = scored_set(tmp_path / "other", [4], "fid")  # as many, but not the same ones
    with pytest.raises(OtherImages, match="of 2 and of 2 pictures, 0 of them"):
        difference(item, other, "s")
    four, item = (scored_set(tmp_path / f"kid{n}", list(range(n)), "kid") for n in (4, 1))
    assert difference(four, item, "s")[0].value == -3


@pytest.mark.parametrize("kind", ["fid", "kid", "cmmd"])
def test_a_paired_reference_is_drawn_with_the_pictures(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known Gaussians, and what a VAE might make of them: errors said are those that other draws show."""
    monkeypatch.setattr(
        "eval.distances.kernels.SUBSETS", 1
    )  # of all pictures: one is as good as a hundred
    generator, count = np.random.default_rng(6), 100
    deviation = 1 / np.arange(1, 9) ** 0.75
    alone = (None,) * count
    draws, paired, options = [], [], []
    for i in range(150):
        y = (1 + generator.normal(size=(count, 8)) * deviation).astype(np.float32)
        x = (0.9 * y + 0.3 + generator.normal(0, 0.1, (count, 8))).astype(np.float32)
        for of, errors in ((False, options), (True, paired))[i >= 20 :]:
            actual = METRICS[kind].distance(x, Reference("", {}, y, alone), of)
            errors.append(actual.influence.std(ddof=1) / np.sqrt(count))
        draws.append(actual.value)
    true = np.std(draws, ddof=1)
    assert 0.8 < np.mean(paired) / true < 1.25
    assert np.mean(options) / true > 1.8  # as if originals had not changed


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_kid_and_cmmd_against_a_folder(
    sets: tuple[Path, Path], real: Path, clip_folder: Path, tmp_path: Path
) -> None:
    from eval.features.networks import inception

    weights = save_inception(tmp_path)
    main(
        [
            "score",
            "kid",
            *map(str, sets),
            "--reference",
            str(real),
            "--inception",
            str(weights),
            "--device",
            "cpu",
        ]
    )
    ((name, score),) = (
        (n, s) for n, s in results.read_all(sets[0]).items() if n.startswith("kid-clean-tiny-real-")
    )
    pictures = of_set(ImageSetReader.open(sets[0])), of_folder(real)
    expected = kid_features(*(extract(p, inception(weights)) for p in pictures))
    assert score.value.value == pytest.approx(1_000 * expected, rel=1e-4)
    assert len(score.made_by["subsets"][""]) == 100
    apart, groups = difference(*sets, name)
    assert apart.low < apart.value < apart.high
    assert set(groups) == {"x", "y"}
    main(
        [
            "score",
            "cmmd",
            str(sets[0]),
            "--reference",
            str(real),
            "--model",
            str(clip_folder),
            "--device",
            "cpu",
        ]
    )
    (score,) = (
        s
        for n, s in results.read_all(sets[0]).items()
        if n.startswith("cmmd-vit-16-14-28-tiny-real-")
    )
    network = Clip(str(clip_folder)).network("cc-bicubic-floor")
    value, _ = cmmd_influence(*(extract(p, network) for p in pictures))
    assert score.value.value == pytest.approx(value, rel=1e-6)


def test_what_is_missing_is_said_before_any_picture_is_read(
    sets: tuple[Path, Path], real: Path, reference: Path, clip_folder: Path, tmp_path: Path
) -> None:
    gone, set_, model = str(tmp_path / "gone"), str(sets[0]), ["--model", str(clip_folder)]
    with pytest.raises(MissingWeights, match="found no inception"):
        main(["score", "fid", gone, "--reference", gone, "--inception", str(tmp_path)])
    with pytest.raises(BadReference, match=r"gone: no such file.*score reference"):
        main(["score", "clip-fid", gone, "--reference", gone, *model])
    with pytest.raises(BadReference, match="made by another network"):
        main(["score", "cmmd", gone, "--reference", str(reference), *model])
    with pytest.raises(
        BadReference, match="made with the crop cc32-lanczos, found --crop cc16-box"
    ):
        main(
            ["score", "clip-fid", gone, "--reference", str(reference), "--crop", "cc16-box", *model]
        )
    with pytest.raises(BadReference, match="labelled photos when it was made"):
        main(["score", "clip-fid", gone, "--reference", str(reference), "--label", "x", *model])
    few = save_folder(tmp_path / "few", 12)
    with pytest.raises(
        TooFewImages, match="few: found 12 pictures, expected at least 13 for clip-fid"
    ):
        main(["score", "clip-fid", set_, "--reference", str(few), *model])
    data = bytearray(reference.read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    (tmp_path / "none").write_bytes(b"none")
    for name, output in (
        ("damaged", "not those that were written"),
        ("none", "not a reference of ours"),
    ):
        with pytest.raises(BadReference, match=output):
            main(["score", "clip-fid", gone, "--reference", str(tmp_path / name), *model])
    with pytest.raises(MissingImages):
        main(["score", "clip-fid", gone, "--reference", str(reference), *model])


def test_few_and_partial_sets_say_so_in_the_name(
    reference: Path, clip_folder: Path, tmp_path: Path
) -> None:
    words = [
        "score",
        "clip-fid",
        str(save_set(tmp_path, prompts_of(9))),
        "--reference",
        str(reference),
    ]
    words += ["--model", str(clip_folder), "--device", "cpu"]
    with pytest.raises(TooFewImages, match="found 9 pictures, expected at least 13"):
        main(words)
    assert not (tmp_path / "scores").exists()
    main([*words, "--allow-few"])
    (tmp_path / "images" / "004.png").unlink()
    with pytest.raises(MissingImages):
        main([*words, "--allow-few"])
    main([*words, "--allow-few", "--partial"])
    name = f"clip-fid-vit-16-14-28-tiny-{read(reference).name}-few"
    actual = results.read_all(tmp_path)
    assert set(actual) == {f"{name}-9", f"{name}-8-partial-8-of-9"}
    assert actual[f"{name}-8-partial-8-of-9"].missing == 1
    assert difference(tmp_path, tmp_path, f"{name}-8-partial-8-of-9")[0].value == 0


def test_a_half_of_an_unfinished_set_says_what_itself_lacks(
    real: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """The lost pictures are of half B alone, and the reference's label ends as partial sets do."""
    folder, prompts = save_set(tmp_path / "set", prompts_of(16)), prompts_of(16)
    lost = prompts.half("b").items[:2]
    for prompt in lost:
        (folder / "images" / f"{prompt.id}.png").unlink()
    words = ["score", "cmmd", str(folder), "--partial", "--reference", str(real)]
    words += ["--model", str(clip_folder), "--device", "cpu", "--label", "some-partial-half-a"]
    for more in ([], ["--half", "a"], ["--half", "b"]):
        main([*words, *more])
    whole, a, b = (
        results.read_all(place) for place in (folder, folder / "halves/a", folder / "halves/b")
    )
    ends = [next(iter(scores)).rpartition("-half-a-")[2][8:] for scores in (whole, a, b)]
    assert ends == ["-partial-14-of-16", "-half-a", "-half-b-partial-6-of-8"]
    assert [next(iter(s.values())).missing for s in (whole, a, b)] == [2, 0, 2]
    for place, scores in ((folder / "halves/a", a), (folder / "halves/b", b)):
        assert difference(place, place, next(iter(scores)))[0].value == 0


def test_a_broken_picture_ends_with_its_name_and_no_score(
    reference: Path, clip_folder: Path, tmp_path: Path
) -> None:
    images = ImageSetReader.open(save_set(tmp_path, prompts_of(14)))
    path = images.images / "003.png"
    path.write_bytes(path.read_bytes()[:50])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["003.png"] = sha256_file(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadPicture, match=r"003\.png: cannot be read"):
        main(
            [
                "score",
                "clip-fid",
                str(tmp_path),
                "--reference",
                str(reference),
                "--model",
                str(clip_folder),
            ]
        )
    assert not (tmp_path / "scores").exists()


def test_variance_counts_prompts_and_their_groups() -> None:
    each = [Influence("p", 0, 1.0, "x", 3.0), Influence("p", 1, 2.0, "x", 5.0), Influence("q", 0, -4.0, "x", -8.0),
            Influence("r", 0, 1.0, "y", 0.5)]  # fmt: skip
    assert totals(each) == {"p": 3 / 4, "q": -1.0, "r": 1 / 4}
    assert totals(each, "x") == pytest.approx({"p": 8 / 3, "q": -8 / 3})
    _, of_x = over_seeds([estimate(0.0, each, "x")])
    assert of_x.prompts == pytest.approx(2 * np.var([8 / 3, -8 / 3], ddof=1))
    _, of_all = over_seeds([estimate(0.0, each)])
    assert of_all.prompts is None  # group y has one prompt
    assert strata_of([*each, Influence("s", 0, 0.0)]) == dict.fromkeys("pqrs")
