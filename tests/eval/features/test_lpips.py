"""LPIPS against its definition, worked on activations that torchvision's own extractor gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from eval.errors import MissingWeights
from eval.features.lpips import Lpips
from tests.eval.small import picture

RELUS = ("features.1", "features.4", "features.7", "features.9", "features.11")
CHANNELS = (64, 192, 384, 256, 256)


def save_weights(folder: Path) -> models.AlexNet:
    """A random AlexNet and heads, in the files that torchvision and lpips publish."""
    torch.manual_seed(0)
    alexnet = models.alexnet().eval()
    torch.save(alexnet.state_dict(), folder / "alexnet-owt-7be5be79.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    torch.save(heads, folder / "alex.pth")
    return alexnet


def test_against_its_definition(tmp_path: Path) -> None:
    alexnet, chance = save_weights(tmp_path), np.random.default_rng(0)
    a, b = (np.stack([picture(chance, 64, 64) for _ in range(2)]) for _ in range(2))
    tap = create_feature_extractor(alexnet, {name: name for name in RELUS})
    heads = torch.load(tmp_path / "alex.pth", weights_only=True)

    def activations(pictures: np.ndarray) -> list[np.ndarray]:
        x = pictures.astype(np.float32) / 127.5 - 1
        x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        with torch.no_grad():
            actual = tap(torch.from_numpy(x.transpose(0, 3, 1, 2)).float())
        return [actual[name].double().numpy() for name in RELUS]

    expected = np.zeros(2)
    for i, (item, other) in enumerate(zip(activations(a), activations(b), strict=True)):
        item, other = (
            x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-10) for x in (item, other)
        )
        head = heads[f"lin{i}.model.1.weight"].numpy()
        expected += (head * (item - other) ** 2).sum(1).mean((1, 2))
    lpips = Lpips("alex", tmp_path)
    assert lpips(a, b) == pytest.approx(expected, rel=1e-4)
    assert lpips(a, a) == [0, 0]
    assert min(expected) > 0.01


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        MissingWeights, match=r"vgg16-397923af\.pth: not found .*download\.pytorch\.org.*--lpips"
    ):
        Lpips("vgg", tmp_path)
    (tmp_path / "vgg16-397923af.pth").touch()
    with pytest.raises(MissingWeights, match=r"vgg\.pth: not found .*pip install lpips"):
        Lpips("vgg", tmp_path)


def test_files_that_are_cut_off_are_named(tmp_path: Path) -> None:
    for name in ("alex.pth", "alexnet-owt-7be5be79.pth"):
        save_weights(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for data in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(
                MissingWeights, match=rf"{name}: not the weights .*\. Fetch \S+{name}"
            ):
                Lpips("alex", tmp_path)
    save_weights(tmp_path)
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes((tmp_path / "alex.pth").read_bytes())
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth: not the weights"):
        Lpips("alex", tmp_path)
