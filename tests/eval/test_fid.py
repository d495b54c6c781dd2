"""Distances against closed forms and clean-fid itself, with a stand-in for Inception."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.errors import MissingWeights, TooFewImages
from eval.fid import (
    folder_features,
    frechet,
    frechet_features,
    inception,
    kid_features,
    score,
)
from eval.intervals import bootstrap

ROOT = Path(__file__).parents[2]


def gaussian(seed: int, width: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(width, rank))
    return generator.normal(size=width), a @ a.T / rank


def test_frechet_of_commuting_gaussians_has_a_closed_form() -> None:
    generator = np.random.default_rng(0)
    q, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    s1, s2 = generator.uniform(0.1, 4, 6), generator.uniform(0.1, 4, 6)
    mu1, mu2 = generator.normal(size=6), generator.normal(size=6)
    by_hand = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    found = frechet(mu1, (q * s1) @ q.T, mu2, (q * s2) @ q.T)
    assert found == pytest.approx(by_hand, rel=1e-12)


def test_frechet_of_a_shifted_sample_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(50, 8))
    assert frechet_features(features, features + 1) == pytest.approx(8.0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
@pytest.mark.parametrize("rank", [32, 200])
def test_frechet_equals_clean_fid(rank: int) -> None:
    from cleanfid import fid

    (mu1, s1), (mu2, s2) = gaussian(1, 64, 200), gaussian(2, 64, rank)
    assert frechet(mu1, s1, mu2, s2) == pytest.approx(
        fid.frechet_distance(mu1, s1, mu2, s2), rel=1e-5
    )
    assert frechet(mu2, s2, mu1, s1) == pytest.approx(frechet(mu1, s1, mu2, s2), rel=1e-9)


def test_kid_against_double_loops() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(9, 5)), generator.normal(size=(9, 5)) + 0.5

    def k(p: np.ndarray, q: np.ndarray) -> float:
        return float((sum(a * b for a, b in zip(p, q, strict=True)) / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (9 * 8)
    across = sum(k(x[i], y[j]) for i, j in pairs) / 81
    # All 9 are in every subset, so each subset gives the same number.
    assert kid_features(x, y) == pytest.approx(within - 2 * across, rel=1e-12)


class Colours(torch.nn.Module):
    """Stands in for Inception: 48 features, means of a 4 x 4 grid of each channel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


def pictures(folder: Path, seed: int, count: int) -> Path:
    generator = np.random.default_rng(seed)
    (folder / "deeper").mkdir(parents=True)
    for i in range(count):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        name = f"deeper/{i}.png" if i % 3 == 0 else f"{i}.jpg"
        Image.fromarray(coarse).resize((40, 32)).save(folder / name)
    return folder


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
def test_folders_score_as_with_clean_fid(tmp_path: Path) -> None:
    from cleanfid import fid

    a, b = pictures(tmp_path / "a", 1, 60), pictures(tmp_path / "b", 2, 64)
    ours = frechet_features(*(folder_features(folder, Colours()) for folder in (a, b)))
    theirs = fid.compute_fid(
        str(a), str(b), custom_feat_extractor=Colours(), device=torch.device("cpu"), num_workers=0,
        use_dataparallel=False, verbose=False,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours > 10


class ScriptedInception(torch.nn.Module):
    """Has the one part of the real TorchScript file that clean-fid uses: `layers`, giving 2,048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stand_in = ScriptedInception().eval()
    torch.jit.script(stand_in).save(str(tmp_path / "inception-2015-12-05.pt"))
    pixels = torch.rand(2, 3, 299, 299) * 255
    with torch.no_grad():
        found, expected = inception(tmp_path)(pixels), stand_in((pixels - 128) / 128)
    torch.testing.assert_close(found, expected)


def test_missing_weights_are_named_with_a_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"found no inception-2015-12-05\.pt in .*--inception"):
        score(tmp_path, tmp_path, tmp_path)


def test_missing_weights_on_the_command_line(tmp_path: Path) -> None:
    a = pictures(tmp_path / "a", 1, 3)
    done = subprocess.run(
        [sys.executable, "-m", "eval", "fid", str(a), str(a), "--inception", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("MissingWeights: FID needs Inception's weights")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "count"), [("one", 1), ("none", 0), ("x.zip", 5)])
def test_folders_that_cannot_be_scored(tmp_path: Path, name: str, count: int) -> None:
    with pytest.raises(TooFewImages):
        folder_features(pictures(tmp_path / name, 0, count), Colours())
    with pytest.raises(TooFewImages, match="no such folder"):
        folder_features(tmp_path / "gone", Colours())


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(lambda i: values[i].mean(), 400, resamples=4_000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.02
    )
    assert found.excludes_zero
    assert not bootstrap(lambda i: values[i].mean() - 3, 400, resamples=500).excludes_zero
