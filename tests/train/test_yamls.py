"""What is shipped in configs/train: the reference's runs, the sizes, and that each is a model that can be built."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs import load
from tests.train.conftest import ROOT
from train.config import TrainConfig, run_folder
from train.model.dit import DiT
from train.run import model_config

FOLDER = ROOT / "configs/train"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
VAES = ("flux", "sd35", "qwen")
RUNS = [f"{vae}{kind}-{side}" for vae in VAES for kind in ("", "-e2e") for side in (256, 512)]
PARAMETERS = {
    "dit1b_256": 1_049_217_600,
    "dit700m_256": 700_691_392,
    "gpu_256": 700_691_392,
    "cpu": None,
}


def config(name: str) -> TrainConfig:
    return load(TrainConfig, FOLDER / f"{name}.yaml")


def differing(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [k for key in keys for k in differing(a.get(key), b.get(key), f"{at}.{key}")]
    return [] if a == b else [at.removeprefix(".")]


def dumped(name: str) -> dict[str, Any]:
    return config(name).model_dump(mode="json")


def test_what_is_there() -> None:
    assert set(FILES) == {*RUNS, *PARAMETERS, "dit3b_256", "dit3b_512"}


@pytest.mark.parametrize("name", FILES)
def test_each_is_a_model(name: str) -> None:
    c = config(name)
    assert c.data.expect is not None
    with torch.device("meta"):
        model = DiT(model_config(c, c.data.expect))
    count = sum(p.numel() for p in model.parameters())
    expected = PARAMETERS.get(name, 2_660_490_816)
    assert count == expected if expected else count < 1e6
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("vae", VAES)
def test_original_and_end_to_end_differ_in_one_value(vae: str) -> None:
    original, end_to_end = f"{vae}-256", f"{vae}-e2e-256"
    assert differing(dumped(original), dumped(end_to_end)) == ["data.latents"]
    assert (config(original).data.latents, config(end_to_end).data.latents) == (
        original,
        end_to_end,
    )
    assert differing(dumped(original), dumped("flux-256")) == (
        ["data.latents"] if vae != "flux" else []
    )


@pytest.mark.parametrize("vae", [f"{vae}{kind}" for vae in VAES for kind in ("", "-e2e")])
def test_the_continuation(vae: str) -> None:
    small, large = config(f"{vae}-256"), config(f"{vae}-512")
    assert differing(dumped(f"{vae}-256"), dumped(f"{vae}-512")) == [
        "data.expect.height", "data.expect.width", "data.latents", "global_batch", "init_from",
        "micro_batch", "steps",
    ]  # fmt: skip
    assert (
        large.init_from == run_folder(small, FOLDER / f"{vae}-256.yaml") == Path(f"runs/{vae}-256")
    )
    assert (large.steps, large.global_batch) == (200_000, 448)
    assert (small.steps, small.global_batch) == (500_000, 1024)


def test_the_recipe_and_mix_of_the_reference() -> None:
    c = config("flux-256")
    assert (c.optim.lr, c.optim.weight_decay, c.optim.betas) == (1e-4, 1e-4, (0.9, 0.999))
    assert (c.optim.schedule, c.optim.warmup, c.optim.clip) == ("constant", 0, 1.0)
    assert (c.ema.decay, c.data.caption_dropout, c.flow.weighting) == (0.9999, 0.1, "logit_normal")
    data = c.data.resolved()
    assert data.weights == (0.595, 0.405)
    assert data.weights[0] == pytest.approx(2697 / 4530, abs=5e-4)  # tars of each
    assert c.data.source_names == ("blip3o-long", "blip3o-short")
    for world in (8, 32):
        assert c.accumulation(world) == 32 // world


@pytest.mark.parametrize("name", [*RUNS, "dit3b_256", "dit1b_256", "gpu_256"])
def test_the_columns_are_those_that_encode_makes(name: str) -> None:
    c = config(name)
    base = yaml.safe_load((ROOT / "configs/encode/base/blip3o.yaml").read_text())
    assert c.data.root == base["root"]
    assert isinstance(c.data.sources, dict)
    assert set(c.data.sources) <= set(base["sources"])
    for column in (c.data.latents, c.data.text):
        columns_ = yaml.safe_load((ROOT / f"configs/encode/{column}.yaml").read_text())["columns"]
        assert column in columns_
    assert c.data.resolved().latents == tuple(
        f"/data/blip3o/columns/{source}/{c.data.latents}" for source in c.data.sources
    )
