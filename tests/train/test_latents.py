"""What follows the latent: the timestep shift, validation whatever it is, and a model whose output is the latent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.images.sampler import sample
from shards import ColumnSpec, Layout, Norm
from tests.train.conftest import TINY, tiny_config, words, write_column
from tests.train.here import fitted, manifest, trained
from train.checkpoints.checkpoint import load_for_sampling

SIDE, WIDTH = 4, 8


def records(run: Path, key: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


# The shift ---------------------------------------------------------------------------------------------------------


def test_a_shift_of_the_latent_is_recorded_as_a_number_and_goes_on(
    columns: Path, tmp_path: Path
) -> None:
    """Latents of 4 x 8 x 8 have the shift sqrt(256 / 4096) = 0.25."""
    values = tiny_config(columns, tmp_path, steps=2, flow={"shift": "auto"})
    code, output, run = fitted(values)
    assert code == 0, output
    assert "noise levels: shift 0.25 (below 1: less noise than evenly spaced levels have)" in output
    record = manifest(run, 2)
    assert record["objective"]["flow"]["shift"] == 0.25
    assert record["config"]["flow"]["shift"] == 0.25
    (start,) = records(run, "start")
    assert (start["shift"], start["prediction"]) == (0.25, "velocity")
    assert "shift 0.25" in (run / "page.html").read_text()
    trained({**values, "steps": 3})
    trained({**values, "steps": 4, "flow": {"shift": 0.25}})  # the same, said as a number
    code, output, _ = fitted({**values, "steps": 5, "flow": {}})
    assert code == 2
    assert "objective.flow.shift: found 0.25, expected None" in output
    assert not (run / "checkpoints/step-00000005").exists()


def test_a_shift_of_three_leaves_no_trace_in_the_identity(columns: Path, tmp_path: Path) -> None:
    """Checkpoints of releases that had no other shift have none in their objective."""
    run = trained(tiny_config(columns, tmp_path, steps=1, flow={"shift": 3}))
    assert manifest(run, 1)["objective"]["flow"].keys() == {
        *("weighting", "logit_mean", "logit_std", "mode_scale", "precondition")
    }


def test_validation_is_at_the_same_levels_for_every_shift(columns: Path, tmp_path: Path) -> None:
    """To the last bit, with a rate so small that no weight moves, and with a loss that is weighted by the levels: they
    are those of shift 3 in the middle of each eighth."""
    validation = {"source": str(columns / "toy-val"), "rows": 20, "batch": 8, "every": 1}
    results, losses = [], []
    for shift, weighting in (
        (3.0, "none"),
        (3.0, "sigma_sqrt"),
        (0.5, "sigma_sqrt"),
        ("auto", "sigma_sqrt"),
    ):
        flow = {"shift": shift, "weighting": weighting}
        values = tiny_config(
            columns, tmp_path / f"{shift}-{weighting}", steps=1, optim={"lr": 1e-38}, validation=validation, flow=flow
        )  # fmt: skip
        run = trained(values)
        (record,) = records(run, "validation")
        results.append({key: value for key, value in record.items() if key != "seconds"})
        losses += records(run, "loss")
    plain, *weighted = results
    assert weighted[0] == weighted[1] == weighted[2]
    assert len(set(losses)) == 4
    s = 1 - (125 * torch.arange(8) + 62) / 1000
    ratio = torch.tensor(weighted[0]["levels"]) / torch.tensor(plain["levels"])
    torch.testing.assert_close(ratio, (3 * s / (1 + 2 * s)) ** -2, rtol=1e-5, atol=0)


# The latent as output ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four latents of 2 x 4 x 4 far from each other, each with a caption of its own; eight rows each."""
    folder = tmp_path_factory.mktemp("few")
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, SIDE, SIDE, generator=g).repeat(8, 1, 1, 1)
    moments = torch.cat([mean, torch.full_like(mean, -30.0)], 1).half().numpy()
    identity = {"source": "few", "encoder": "toy"}
    layout = Layout("moments", (4, SIDE, SIDE), 1)
    write_column(folder / "vae", ColumnSpec(identity, layout, Norm((0.0,), (1.0,))), moments)
    spec = ColumnSpec(identity, Layout("tokens", (1, WIDTH), 1), None, 1)
    captions = [words(3 * torch.eye(WIDTH)[i % 4, None]) for i in range(32)]
    write_column(folder / "text", spec, captions, words(torch.zeros(1, WIDTH)))
    return folder


@pytest.mark.parametrize("prediction", ["latent", "velocity"])
def test_a_model_that_has_learned_its_rows_samples_them(
    few: Path, tmp_path: Path, prediction: str
) -> None:
    values: dict[str, Any] = tiny_config(few, tmp_path, steps=400, save_every=400, log_every=100)
    values["data"] = {"latents": str(few / "vae"), "text": str(few / "text"), "lanes": 16}
    values |= {
        "model": {**TINY, "hidden_size": 64, "patch_size": 4},
        "micro_batch": 16, "optim": {"lr": 5e-3, "schedule": "cosine", "warmup": 20},
        "flow": {"prediction": prediction, "shift": 1.0}, "ema": {"decay": 0.9},
    }  # fmt: skip
    run = trained(values)
    model, record = load_for_sampling(run)
    assert record["objective"]["flow"].get("prediction", "velocity") == prediction
    g = torch.Generator().manual_seed(0)
    expected = torch.randn(4, 2, SIDE, SIDE, generator=g)
    text = [3 * torch.eye(WIDTH)[i, None] for i in range(4)]
    noise = torch.randn(4, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    latents = sample(
        model, text, torch.zeros(1, WIDTH), noise=noise, guidance=1.0, shift=1.0, prediction=prediction
    )  # fmt: skip
    distances = (latents[:, None] - expected[None]).flatten(2).norm(dim=2) / expected.norm() * 2
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().max() < 0.35
