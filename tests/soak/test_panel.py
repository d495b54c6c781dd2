"""The latent spaces of the panel, its ranking, and what is committed of its last run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.scores.ranks import RankCorrelation
from tests.soak import panel, variants

ROOT = Path(__file__).parents[2]
RECORD = json.loads(panel.RESULT.read_text())


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    """Correlated rows (N, 16, 8, 8), smooth along both axes, of deviation 1."""
    chance = np.random.default_rng(0)
    mix = chance.normal(size=(16, 16))
    z = np.einsum("dc,nchw->ndhw", mix, chance.normal(size=(400, 16, 8, 8)))
    z = z + np.roll(z, 1, 2) + np.roll(z, 1, 3) + 0.3
    return z / z.std()


def mapped(z: np.ndarray, maps: dict) -> tuple[np.ndarray, np.ndarray]:
    """A variant of latents, and what comes back of it, by numpy alone."""
    flat = z.reshape(len(z), 16, 64) - np.reshape(maps["centre"], (-1, 1))
    there = np.einsum("dc,ncp,qp->ndq", maps["mix"], flat, maps["filter"])
    back = np.einsum("dc,ncp,qp->ndq", maps["unmix"], there, maps["unfilter"])
    return there, (back + np.reshape(maps["centre"], (-1, 1))).reshape(z.shape)


@pytest.mark.parametrize("kind", ["rotated", "whitened", "noise25", "pc12", "pc8", "low", "high"])
def test_maps_have_deviation_one_and_a_way_back(kind: str, latents: np.ndarray) -> None:
    maps = variants._map(kind, latents)
    there, back = mapped(latents, maps)
    assert there.std() == pytest.approx(1, abs=0.05)
    if kind in ("rotated", "whitened", "noise25", "high"):
        np.testing.assert_allclose(back, latents, atol=1e-9)
    else:  # what is lost is lost, what is kept is kept: mapped again it is the same
        assert np.abs(back - latents).max() > 0.1
        np.testing.assert_allclose(mapped(back, maps)[0], there, atol=1e-9)
    if kind == "rotated":
        np.testing.assert_allclose(maps["mix"] @ maps["mix"].T, np.eye(16), atol=1e-12)
    if kind == "whitened":
        np.testing.assert_allclose(there.std((0, 2)), 1, atol=1e-9)
    if kind in ("low", "high"):
        share = high_share(there) / high_share(latents.reshape(len(latents), 16, 64))
        assert share < 1e-9 if kind == "low" else share > 1


def high_share(z: np.ndarray) -> float:
    """The share of variance in cosines from half of the highest frequency on, by scipy."""
    from scipy.fft import dctn

    power = np.square(dctn(z.reshape(len(z), -1, 8, 8), axes=(2, 3), norm="ortho"))
    return float((power[..., 4:, :].sum() + power[..., :4, 4:].sum()) / power.sum())


def test_a_variant_of_a_vae_decodes_as_the_vae(
    tmp_path: Path, latents: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "normalised", lambda _: latents)
    variants.save_variant("rotated", ROOT / "configs/demo/vae-plain", tmp_path, tmp_path / "vae")
    model = variants.Variant(str(tmp_path / "vae")).eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        mean, logvar = model.encode(pixels)
        plain = model.vae.encode(pixels).latent_dist
        assert torch.isfinite(logvar).all()
        np.testing.assert_allclose(
            model.decode(mean), model.vae.decode(plain.mean).sample, atol=1e-4
        )


def test_only_a_high_rank_of_a_named_figure_is_a_claim() -> None:
    def of(value: float) -> RankCorrelation:
        return RankCorrelation(value=value, low=None, high=None, entries=10)

    assert panel.predicting({"ifid": of(0.64), "lds": of(0.9), panel.JOINT: of(0.63)}) == ["ifid"]


def test_a_known_order_and_the_placebo_left_out() -> None:
    entries = [*panel.VAES, *variants.VARIANTS]
    scores = {name: [float(i), i + 1.0] for i, name in enumerate(entries)}
    figures = {
        name: {"ifid": -i if name == panel.PLACEBO[0] else i, "linear_reference_given_text": -i, "rfd": i}
        for i, name in enumerate(entries)
    }  # fmt: skip
    ranked = panel.correlations(figures, scores)
    assert ranked["ifid"].value == pytest.approx(1)
    assert ranked["ifid"].entries == 10
    assert ranked["linear_reference_given_text"].value == pytest.approx(-1)
    assert panel.JOINT not in ranked  # their ranks cancel


def test_docs_quote_the_result_and_claim_no_more() -> None:
    page = panel.DOCS.read_text()
    assert panel.with_tables(page, RECORD) == page
    ranked = {k: RankCorrelation(**v) for k, v in RECORD["ranks"].items()}
    assert RECORD["predicts"] == panel.predicting(ranked)
    if not RECORD["predicts"]:
        texts = [page, *((ROOT / "eval/report").glob("*.j2"))]
        words = [text if isinstance(text, str) else text.read_text() for text in texts]
        assert not any(re.search(r"\bpredicts\b", text) for text in words)
    a, b = (np.mean(RECORD["entries"][name]["demo-fd"]) for name in panel.PLACEBO)
    assert abs(a - b) < 2.3 * RECORD["deviation"]  # t of 11 degrees, two means of two seeds
