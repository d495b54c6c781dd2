"""The structure of latents, each figure against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from shards.probe.structure import NEAREST, Neighbours, Structure
from tests.shards.probe.known import ArrayRows, mixed, white


def structure_of(rows: ArrayRows) -> Structure:
    structure = Structure(rows.shape)
    for part in rows.parts():
        structure.add(part)
    return structure


@pytest.mark.parametrize(("height", "width", "far"), [(5, 4, 2), (16, 16, 6), (3, 8, 3)])
def test_local_similarity_is_irepas(height: int, width: int, far: int) -> None:
    latents = white(20, (3, height, width)).cumsum(3) + 0.5
    near, distant = [], []
    places = [(y, x) for y in range(height) for x in range(width)]
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    for y, x in places:
        for v, u in places:
            distance = abs(y - v) + abs(x - u)
            cosine = (unit[:, :, y, x] * unit[:, :, v, u]).sum(1).mean()
            near += [cosine] if distance == 1 else []
            distant += [cosine] if distance >= far else []
    result = structure_of(ArrayRows(latents)).local_similarity()
    assert result["value"] == pytest.approx(np.mean(near) - np.mean(distant), abs=1e-5)
    assert result["low"] < result["value"] < result["high"]


def test_a_grid_without_distant_places_has_no_local_similarity() -> None:
    result = structure_of(ArrayRows(white(70, (3, 1, 1)))).local_similarity()
    assert result["value"] is None
    assert "1 x 1" in result["why"]


def test_channels_and_the_posterior() -> None:
    latents = white(70, (3, 4, 5)) * np.array([1, 2, 5], np.float32)[:, None, None] + 1
    variance = np.random.default_rng(0).random(latents.shape).astype(np.float32)
    structure = structure_of(ArrayRows(latents, variance, block=9))
    mean, deviation = structure.channels()
    wide = latents.astype(np.float64)
    total = wide.var((0, 2, 3)) + variance.mean((0, 2, 3))
    np.testing.assert_allclose(mean, wide.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(deviation, np.sqrt(total), rtol=1e-5)
    share = structure.posterior_share()["value"]
    assert share == pytest.approx(variance.mean() * 3 / total.sum(), rel=1e-5)
    flat = wide.transpose(1, 0, 2, 3).reshape(3, -1)
    noise = np.diag(variance.mean((0, 2, 3)))
    values = np.linalg.eigvalsh(np.cov(flat, bias=True) + noise)
    part = values / values.sum()
    expected = np.exp(-sum(p * np.log(p) for p in part))
    assert structure.effective_rank()["value"] == pytest.approx(expected, rel=1e-5)


def test_white_channels_have_full_rank_and_one_of_variance_has_rank_one() -> None:
    latents = white(512, (6, 4, 4))
    assert structure_of(ArrayRows(latents)).effective_rank()["value"] == pytest.approx(6, rel=0.01)
    latents[:, 1:] *= 1e-4
    assert structure_of(ArrayRows(latents)).effective_rank()["value"] == pytest.approx(1, rel=0.01)


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    latents, _ = mixed(white(90, (3, 5, 4)))
    group = np.arange(90) % 4
    latents += 2 * white(4, (3, 5, 4), 8)[group]
    neighbours = Neighbours(group)
    for row in range(5):  # all frequencies, each once
        for column in range(4):
            spectrum = np.fft.fft2(latents, norm="ortho")[:, :, row, column]
            neighbours.add(1.0, spectrum.astype(np.complex64))
    flat = latents.reshape(90, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    shares = []
    for i in range(90):
        cosine = [(float(unit[i] @ unit[j]), j) for j in range(90) if j != i]
        shares.append(np.mean([group[j] == group[i] for _, j in sorted(cosine)[-NEAREST:]]))
    result = neighbours.share()
    assert result["value"] == pytest.approx(np.mean(shares))
    assert result["groups"] == 4
    chance = np.mean([(np.sum(group == g) - 1) / 89 for g in group])
    assert result["chance"] == pytest.approx(chance)
    assert result["value"] > 2 * result["chance"]
