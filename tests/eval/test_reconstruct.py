"""A column's pictures beside the originals: right rows, right decoder, right numbers."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encode.config import EncodeConfig
from encode.run.job import run as encode
from eval.commands import main
from eval.distances import influences
from eval.distances.frechet import frechet_features
from eval.distances.kernels import kid_influence
from eval.distances.measure import difference
from eval.distances.metrics import METRICS
from eval.distances.slices import mind_influence
from eval.errors import BadRequest, MissingPictures, MissingWeights, OtherImages, TooFewImages
from eval.features.features import extract, of_set
from eval.features.networks import inception
from eval.images.imageset import ImageSetReader
from eval.latents.detail import octave_names
from eval.latents.flags import RECONSTRUCTION_SCORES
from eval.reconstruct import MORE, psnr, reconstruct, ssim
from eval.report.report import report
from eval.scores import results
from shards import Column
from tests.eval.features.test_lpips import save_weights
from tests.eval.latents.test_interpolation import random_column
from tests.eval.small import save_inception

ROOT = Path(__file__).parents[2]
BROKEN = 2


def picture(i: int) -> np.ndarray:
    """48 x 40 with a colour that says which one it is."""
    rows, columns = np.mgrid[:48, :40]
    return np.stack([rows * 5, columns * 6, np.full_like(rows, 40 * i)], -1).astype(np.uint8)


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            file = io.BytesIO()
            Image.fromarray(picture(i)).save(file, "JPEG", quality=95)
            data = file.getvalue() if i != BROKEN else b"no picture"
            for name, content in ((f"sample/{i}.jpg", data), (f"sample/{i}.txt", b"a cat")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path) -> Path:
    """Source `pair` of two tars with 4 and 2 pictures, the third broken; its column `tiny`."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "tars").mkdir()
    write_tar(folder / "tars" / "0.tar", range(4))
    write_tar(folder / "tars" / "1.tar", range(4, 6))
    config = EncodeConfig.model_validate(
        {
            "root": str(folder),
            "sources": {"pair": [str(folder / "tars" / "0.tar"), str(folder / "tars" / "1.tar")]},
            "columns": {
                "tiny": {
                    "kind": "moments",
                    "encoder": {"class": "AutoencoderKL", "path": str(vae_folder)},
                    "resolution": 32,
                }
            },
            "shard_rows": 1024,
            "engine": {"executor": "inline", "device": "cpu"},
        }
    )
    assert encode(config) == 0
    return folder


@torch.no_grad()
def test_reconstructions_are_the_decoded_means(
    cache: Path, vae_folder: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    metrics = reconstruct(cache / "pair" / "tiny", cache / "tars", tmp_path, count=4, batch_size=3)
    assert [p["row"] for p in metrics["pictures"]] == [
        0,
        1,
        3,
        1024,
    ]  # 2 is broken; a shard is 1024 row ids
    assert [p["key"] for p in metrics["pictures"]] == [f"sample/{i}" for i in (0, 1, 3, 4)]
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    for number, entry in zip((0, 1, 3, 4), metrics["pictures"], strict=True):
        name = f"images/{entry['row']:08d}.png"
        before, after = (
            np.array(Image.open(tmp_path / kind / name)) for kind in ("original", "reconstruction")
        )
        assert before.shape == after.shape == (32, 32, 3)
        assert abs(int(before[..., 2].mean()) - 40 * number) < 4  # the right picture
        pixels = torch.from_numpy(before).permute(2, 0, 1)[None] / 127.5 - 1
        expected = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        expected = ((expected + 1) * 127.5)[0].permute(1, 2, 0).numpy()
        assert np.abs(after - expected).max() < 1.5  # the column holds fp16
        error = ((before.astype(float) - after) ** 2).mean()
        assert entry["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert metrics["mean"]["count"] == 4
    assert metrics["mean"]["psnr"] == pytest.approx(
        np.mean([p["psnr"] for p in metrics["pictures"]])
    )


def test_again_is_the_same_and_more_is_refused(cache: Path, tmp_path: Path) -> None:
    column = cache / "pair" / "tiny"
    first = reconstruct(column, cache / "tars", tmp_path, count=2)
    assert reconstruct(column, cache / "tars", tmp_path, count=2) == first
    assert json.loads((tmp_path / "metrics.json").read_text()) == first
    with pytest.raises(OtherImages, match="images of other settings"):
        reconstruct(column, cache / "tars", tmp_path, count=3)
    assert json.loads((tmp_path / "metrics.json").read_text()) == first


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scores_of_two_columns_of_one_source_are_paired(
    cache: Path, vae_folder: Path, tmp_path: Path
) -> None:
    weights = save_inception(tmp_path / "weights")
    save_weights(weights)
    column = cache / "pair" / "tiny"
    shutil.copytree(column, column.parent / "other", dirs_exist_ok=True)
    for name in ("tiny", "other"):
        actual = reconstruct(
            column.parent / name, cache / "tars", tmp_path / name, count=4, scores=["lpips-alex", "rkid", "rmind"],
            inception_folder=weights, lpips_folder=weights,
        )  # fmt: skip
    folders = [tmp_path / name / "reconstruction" for name in ("tiny", "other")]
    first, second = (results.read_all(folder) for folder in folders)
    (rkid,) = (name for name in first if name.startswith("rkid-clean-reconstruct-pair-originals-"))
    octaves = octave_names(32, 32)
    (rmind,) = (
        name for name in first if name.startswith("rmind-clean-reconstruct-pair-originals-")
    )
    assert first.keys() == second.keys() == {"psnr", *octaves, "ssim", "lpips-alex", rkid, rmind}
    for name in ("psnr", *octaves, "ssim", "lpips-alex"):
        items = results.read_items(folders[0] / "scores" / f"{name}.json")
        assert [item.value for item in items] == [p[name] for p in actual["pictures"]]
        assert first[name].value.value == pytest.approx(actual["mean"][name])
        assert first[name].value.low <= first[name].value.value <= first[name].value.high
    assert [first[name].better for name in ("psnr", "lpips-alex", rkid)] == [
        "higher",
        "lower",
        "lower",
    ]
    assert first[rkid].value.value > 0
    assert (
        difference(*folders, rkid)[0].value == 0
    )  # the same pictures, under the same prompts and originals
    network = inception(weights, "cpu")
    b, a = (
        extract(of_set(ImageSetReader.open(tmp_path / "other" / kind)), network)
        for kind in ("reconstruction", "original")
    )
    kept = influences.read(folders[1], rkid, second[rkid].images)
    expected = 1000 * (kid_influence(b, a) + kid_influence(a, b))  # originals are drawn with them
    np.testing.assert_allclose([i.all for i in kept], expected, rtol=1e-6, atol=1e-9)
    kept = influences.read(folders[1], rmind, second[rmind].images)
    expected = mind_influence(b, a)[1] + mind_influence(a, b)[1]
    np.testing.assert_allclose([i.all for i in kept], expected, rtol=1e-6, atol=1e-9)
    assert second[rmind].value.value == pytest.approx(mind_influence(b, a)[0], rel=1e-6)
    (section,) = report([tmp_path / "tiny", tmp_path / "other"], tmp_path / "r.html")["sections"]
    assert section["benchmark"] == "reconstruct-pair"
    assert {score["scorer"] for score in section["scores"]} == first.keys()
    (comparison,) = section["comparisons"]
    assert comparison["warnings"] == []
    assert len(comparison["differences"]) == 5 + len(octaves)
    for actual in comparison["differences"]:
        assert actual["value"]["value"] == 0
        assert not actual["warnings"]
    # else two VAEs would be "scored differently"
    assert not {"column", "vae"} & first["psnr"].made_by.keys()


@torch.no_grad()
def test_interpolated_pictures_and_their_distance(
    cache: Path, vae_folder: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    column = cache / "pair" / "tiny"
    shutil.copytree(column, column.parent / "twin", dirs_exist_ok=True)
    for name in ("tiny", "twin"):
        mean = reconstruct(
            column.parent / name, cache / "tars", tmp_path / name, count=3, scores=["idemo-fd"], allow_few=True,
        )["mean"]  # fmt: skip
    folder = tmp_path / "tiny"
    scored = results.read_all(folder / "reconstruction")
    (name,) = (name for name in scored if name.startswith("idemo-fd-"))
    assert "half-way to the nearest of 2 rows" in " ".join(scored[name].notes)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    opened = Column.open(column)
    moments = torch.from_numpy(opened.read(np.array([0, 1, 3, 1024, 1025]))).float()
    norm = opened.spec.norm
    assert norm is not None
    shift, scale = (torch.from_numpy(array) for array in norm.arrays)
    z = (moments.chunk(2, 1)[0] - shift) * scale
    pictures = []
    for a in z[:3]:
        b = max(z[3:], key=lambda b: float(torch.cosine_similarity(a.ravel(), b.ravel(), 0)))
        angle = torch.arccos(torch.cosine_similarity(a.ravel().double(), b.ravel().double(), 0))
        middle = (torch.sin(angle / 2) / torch.sin(angle)).float() * (a + b)
        decoded = vae.decode((middle / scale + shift)[None]).sample.clamp(-1, 1)
        pictures.append(((decoded + 1) * 127.5)[0].permute(1, 2, 0).numpy())
    for row, expected in zip((0, 1, 3), pictures, strict=True):
        image = np.array(Image.open(folder / f"interpolation/images/{row:08d}.png"))
        assert np.abs(image - expected).max() < 1
    network = METRICS["demo-fd"].load(METRICS["demo-fd"].model, "cpu")
    features = [
        extract(of_set(ImageSetReader.open(folder / kind)), network)
        for kind in ("interpolation", "original")
    ]
    assert scored[name].value.value == pytest.approx(frechet_features(*features), abs=1e-6)
    assert mean["idemo-fd"] == scored[name].value.value
    folders = [tmp_path / name / "reconstruction" for name in ("tiny", "twin")]
    assert difference(*folders, name)[0].value == 0
    reconstruct(  # another choice of neighbours is another score, never set beside the first
        column, cache / "tars", tmp_path / "drawn", count=3, scores=["idemo-fd"], allow_few=True, neighbours=2,
        draw=True,
    )  # fmt: skip
    assert name not in results.read_all(tmp_path / "drawn" / "reconstruction")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 5}, TooFewImages, "found 0 rows beside the evaluated ones"),
        ({"neighbours": 10}, BadRequest, "found neighbours 10 without draw"),
        ({"draw": True}, BadRequest, "found neighbours 1 with draw"),
        ({"neighbours": 3, "draw": True}, TooFewImages, "found 2 rows .* at least 3"),
    ],
)
def test_neighbours_that_cannot_be_had(
    options: dict[str, Any], error: type[Exception], message: str, cache: Path, tmp_path: Path
) -> None:
    words = {"count": 3, "scores": ["idemo-fd"], "allow_few": True, **options}
    with pytest.raises(error, match=message):
        reconstruct(cache / "pair" / "tiny", cache / "tars", tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()


def test_also_columns_of_another_source_are_refused(cache: Path, tmp_path: Path) -> None:
    other = random_column(tmp_path / "other").path
    column = cache / "pair" / "tiny"
    with pytest.raises(OtherImages, match="found a column of another source"):
        reconstruct(column, cache / "tars", tmp_path / "out", count=3, also=[other])
    assert not (tmp_path / "out").exists()
    alone = reconstruct(column, cache / "tars", tmp_path / "alone", count=3)
    both = reconstruct(column, cache / "tars", tmp_path / "both", count=3, also=[column])
    assert both == alone


def test_the_command_line_knows_every_score() -> None:
    assert RECONSTRUCTION_SCORES == MORE


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_a_score_needs_is_said_before_anything_is_made(cache: Path, tmp_path: Path) -> None:
    column, out = cache / "pair" / "tiny", tmp_path / "out"
    with pytest.raises(MissingWeights, match="--inception"):
        reconstruct(column, cache / "tars", out, scores=["rfid"], inception_folder=tmp_path)
    with pytest.raises(MissingWeights, match="--lpips"):
        reconstruct(column, cache / "tars", out, scores=["lpips-vgg"], lpips_folder=tmp_path)
    weights = save_inception(tmp_path / "weights")
    with pytest.raises(
        TooFewImages, match=r"found 5 pictures, expected at least 2049.*--allow-few"
    ):
        reconstruct(column, cache / "tars", out, scores=["rfid"], inception_folder=weights)
    assert not out.exists()


def test_missing_tars_on_the_command_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [cache / "pair" / "tiny", "--tars", tmp_path, "--save_dir", tmp_path / "out"]
    with pytest.raises(MissingPictures):
        main(["reconstruct", *map(str, words)])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_tars_of_another_source(cache: Path, tmp_path: Path) -> None:
    """The same name, but not the bytes: said before anything is written."""
    data = (cache / "tars" / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data + bytes(512))
    wrong = f"found {len(data) + 512:,} bytes, expected one of {len(data):,} bytes.*--tars"
    with pytest.raises(MissingPictures, match=wrong):
        reconstruct(cache / "pair" / "tiny", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_that_changed(cache: Path, tmp_path: Path) -> None:
    data = bytearray((cache / "tars" / "0.tar").read_bytes())
    data[512:600] = bytes(88)
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(MissingPictures, match="sample/0 was a picture"):
        reconstruct(cache / "pair" / "tiny", tmp_path, tmp_path / "out")


def test_psnr_and_ssim() -> None:
    a = picture(1)
    assert psnr(a, a + np.uint8(2)) == pytest.approx(20 * np.log10(255 / 2))
    assert psnr(a, a) == pytest.approx(10 * np.log10(255**2 * a.size))
    assert ssim(a, a) == pytest.approx(1)
    flat, other = np.full((24, 24, 3), 100, np.uint8), np.full((24, 24, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2  # for flat pictures only the term of the means is left
    assert ssim(flat, other) == pytest.approx(
        (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), rel=1e-6
    )
