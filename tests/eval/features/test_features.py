"""A feature pass gives clean-fid's numbers, keeps them, and trusts only those of the same pictures and network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from eval.distances.fid import score
from eval.distances.frechet import frechet_features
from eval.distances.kernels import kid_features
from eval.errors import BadPicture, TooFewImages
from eval.features import features
from eval.features.features import Pictures, clean_listing, extract, folder_of, of_folder, of_set
from eval.features.networks import Network
from eval.images.imageset import ImageSetReader
from tests.eval.small import colours, picture, prompts_of, save_folder, save_inception, save_set


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind of file that clean-fid takes, and one that it does not."""
    folder = tmp_path_factory.mktemp("odd")
    chance = np.random.default_rng(0)
    (folder / "b" / "deeper").mkdir(parents=True)
    image = Image.fromarray(picture(chance, 40, 33))
    for mode, name in (("L", "grey.png"), ("RGBA", "b/alpha.png"), ("P", "palette.png"),
                       ("1", "b/deeper/bits.bmp"), ("CMYK", "inks.jpg"), ("RGB", "B.JPEG"), ("LA", "grey alpha.png"),
                       ("RGB", "[x].webp")):  # fmt: skip
        image.convert(mode).save(folder / name)
    Image.fromarray(chance.integers(0, 65_536, (20, 20)).astype(np.uint16)).save(
        folder / "deep.png"
    )
    np.save(folder / "array.npy", picture(chance))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_the_pass_is_clean_fids(odd: Path) -> None:
    from cleanfid import fid

    theirs = fid.get_folder_features(
        str(odd), lambda x: colours().features(x), num_workers=0, batch_size=4, device=torch.device("cpu"),
        verbose=False,
    )  # fmt: skip
    pictures = of_folder(odd)
    ours = extract(pictures, colours(), batch_size=4)
    assert ours.shape == (10, 48)
    assert np.array_equal(ours, theirs)
    groups = {
        Path(name).name: group for name, group in zip(pictures.names, pictures.groups, strict=True)
    }
    assert (groups["bits.bmp"], groups["alpha.png"], groups["grey.png"]) == ("b", "b", None)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
def test_folders_score_as_with_clean_fid(tmp_path: Path) -> None:
    from cleanfid import fid

    a, b = save_folder(tmp_path / "a", 60, 1, ("", "deeper")), save_folder(tmp_path / "b", 64, 2)
    ours = [extract(of_folder(folder), colours()) for folder in (a, b)]
    theirs = fid.compute_fid(
        str(a), str(b), custom_feat_extractor=lambda x: colours().features(x), device=torch.device("cpu"),
        num_workers=0, use_dataparallel=False, verbose=False,
    )  # fmt: skip
    assert frechet_features(*ours) == pytest.approx(theirs, rel=1e-4)
    assert theirs > 10
    np.random.seed(0)
    theirs = fid.kernel_distance(*(each.astype(np.float64) for each in ours))
    assert kid_features(*ours) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_kid_of_two_folders_is_clean_fids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call, its own reading of the weights, to the number; only the place of the weights is told to it."""
    from cleanfid import features as theirs
    from cleanfid import fid

    a, b = save_folder(tmp_path / "a", 12, 1), save_folder(tmp_path / "b", 14, 2)
    weights = save_inception(tmp_path / "weights")
    monkeypatch.setattr(theirs, "InceptionV3W", lambda path, **how: _inception_at(weights, how))
    np.random.seed(0)
    actual = fid.compute_kid(
        str(a), str(b), num_workers=0, device=torch.device("cpu"), use_dataparallel=False, verbose=False
    )  # fmt: skip
    ours = score(a, b, weights)
    assert ours["kid_x1000"] == pytest.approx(1000 * actual, rel=1e-3)  # clean-fid adds in fp32
    assert str(ours["note"]).startswith(
        "FID of 12 pictures: fewer than 2049 leave no full covariance"
    )


def _inception_at(folder: Path, how: dict[str, object]) -> torch.nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W

    return InceptionV3W(str(folder), **how | {"download": False})


class Counted:
    """A network that counts the pictures it is shown."""

    def __init__(self) -> None:
        self.seen = 0
        plain = colours()

        def shown(pixels: torch.Tensor) -> torch.Tensor:
            self.seen += len(pixels)
            return plain.features(pixels)

        self.network = replace(plain, features=shown)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(features, "BLOCK", 4)
    return None


@pytest.mark.usefixtures("small_blocks")
def test_features_are_kept_and_only_what_changed_is_made_again(tmp_path: Path) -> None:
    folder, kept, counted = save_folder(tmp_path / "a", 10), tmp_path / "kept", Counted()
    first = extract(of_folder(folder), counted.network, folder=kept, batch_size=3)
    assert counted.seen == 10
    assert sorted(path.name for path in kept.iterdir()) == [
        f"0000{i}.safetensors" for i in range(3)
    ]
    assert np.array_equal(extract(of_folder(folder), counted.network, folder=kept), first)
    assert counted.seen == 10
    Image.fromarray(picture(np.random.default_rng(9))).save(folder / "005.png")
    second = extract(of_folder(folder), counted.network, folder=kept)
    assert counted.seen == 14  # the block of the changed picture
    assert [i for i in range(10) if not np.array_equal(first[i], second[i])] == [5]
    block = kept / "00002.safetensors"
    block.write_bytes(block.read_bytes()[:-9])
    assert np.array_equal(extract(of_folder(folder), counted.network, folder=kept), second)
    assert counted.seen == 16
    with safe_open(block, "numpy") as file:
        record = file.metadata()
    save_file({"features": np.full((2, 48), np.nan, np.float32)}, block, record)
    assert np.array_equal(extract(of_folder(folder), counted.network, folder=kept), second)
    assert counted.seen == 18
    other = replace(counted.network, weights="11" * 32)
    extract(of_folder(folder), other, folder=kept)
    extract(of_folder(folder), other, "cc16-box", kept)
    assert counted.seen == 38


@pytest.mark.usefixtures("small_blocks")
def test_an_unreadable_picture_is_named_and_what_stood_before_it_is_kept(tmp_path: Path) -> None:
    folder, kept, counted = save_folder(tmp_path / "a", 10), tmp_path / "kept", Counted()
    whole = (folder / "006.png").read_bytes()
    for damaged in (whole[:60], b"", b"no picture"):
        (folder / "006.png").write_bytes(damaged)
        with pytest.raises(BadPicture, match=r"006\.png: cannot be read as a picture .*Restore it"):
            extract(of_folder(folder), counted.network, folder=kept)
    assert counted.seen == 4
    (folder / "006.png").write_bytes(whole)
    extract(of_folder(folder), counted.network, folder=kept)
    assert counted.seen == 10


def test_files_of_every_kind_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pictures", 3)
    np.save(tmp_path / "grey.npy", np.zeros((8, 8), np.uint8))
    damaged = {
        "a.npy": b"",
        "b.npy": (tmp_path / "grey.npy").read_bytes(),
        "c.ppm": b"P6\n99999999 2\n255\n",  # far too large a picture
    }
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
        with pytest.raises(BadPicture, match=rf"{name}: cannot be read as a picture"):
            extract(of_folder(folder), colours())
        (folder / name).unlink()


def test_memory_holds_a_few_batches(tmp_path: Path) -> None:
    """No picture is read long before its turn."""
    read, run = [0], list[int]()

    def item(i: int) -> np.ndarray:
        read[0] += 1
        return np.zeros((8, 8, 3), np.uint8)

    def network(pixels: torch.Tensor) -> torch.Tensor:
        run.append(read[0] - sum(run_lengths))
        run_lengths.append(len(pixels))
        return pixels.mean((2, 3))

    run_lengths: list[int] = []
    pictures = Pictures([f"{i}" for i in range(100)], [""] * 100, item)
    plain = Network(
        "n",
        "0" * 64,
        "none",
        3,
        lambda p: torch.from_numpy(p.transpose(2, 0, 1).copy()).float(),
        network,
    )
    assert extract(pictures, plain, batch_size=10).shape == (100, 3)
    assert run_lengths == [10] * 10
    assert max(run) <= 30


def test_pictures_of_a_set_are_in_its_order_tiles_alone(tmp_path: Path) -> None:
    grids = ImageSetReader.open(save_set(tmp_path / "g", prompts_of(3), layout="grids", count=4))
    pictures = of_set(grids)
    assert len(pictures) == len(set(pictures.digests)) == 12
    actual = extract(pictures, colours())
    by_hand = [np.asarray(Image.open(grids.images / f"{i:03d}.png")) for i in range(3)]
    tiles = [grid[y : y + 32, x : x + 32] for grid in by_hand for y in (0, 32) for x in (0, 32)]
    expected = torch.cat([colours().features(colours().prepare(tile)[None]) for tile in tiles])
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5)
    jpegs = ImageSetReader.open(save_set(tmp_path / "j", prompts_of(3), layout="jpeg"))
    assert [Path(name).name for name in of_set(jpegs).names] == ["000.jpeg", "001.jpeg", "002.jpeg"]
    names = {folder_of(tmp_path, colours(), cut).name for cut in ("none", "cc16-box")}
    assert names == {"colours-00000000-clean299-none", "colours-00000000-clean299-cc16-box"}


@pytest.mark.parametrize("count", [0, 1])
def test_folders_with_too_few(tmp_path: Path, count: int) -> None:
    (tmp_path / "few").mkdir()
    with pytest.raises(TooFewImages, match=f"found {count} pictures"):
        clean_listing(save_folder(tmp_path / "few", count))
    with pytest.raises(TooFewImages, match="no such folder"):
        of_folder(tmp_path / "gone")
