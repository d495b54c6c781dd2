"""A run that starts from given weights: whose, which, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs import ConfigError
from shards import ColumnSpec, Layout, Norm, seal
from tests.train.conftest import CHANNELS, SIDE, tiny_config, write_column
from tests.train.here import fitted, losses, manifest, step_folder, trained
from train.checkpoints import init_weights
from train.checkpoints.checkpoint import CheckpointError, verified
from train.checkpoints.identity import compared, training_of
from train.config import TrainConfig
from train.model.dit import DiTConfig
from train.run import expected_record, model_config, open_columns, shape_of


@pytest.fixture(scope="module")
def source(columns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps, at a rate that takes weights and average apart."""
    folder = tmp_path_factory.mktemp("source")
    return trained(tiny_config(columns, folder, steps=2, optim={"lr": 0.05}))


def still(columns: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A config at a rate so small that no weight moves."""
    return tiny_config(columns, folder, **{"steps": 1, "optim": {"lr": 1e-38}, **changes})


def assert_starts_as(run: Path, file: Path) -> None:
    result, expected = load_file(step_folder(run, 1) / "weights.safetensors"), load_file(file)
    assert result.keys() == expected.keys()
    for name in expected:  # but for the step itself, which takes 1e-38 from what is zero
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=1e-30)


def test_from_the_average_of_a_run(columns: Path, source: Path, tmp_path: Path) -> None:
    step = step_folder(source, 2)
    run = trained(still(columns, tmp_path, init_from=str(source)))
    assert_starts_as(run, step / "ema.safetensors")
    record = manifest(run, 1)
    assert (record["step"], record["position"]) == (1, 16)
    digest = manifest(source, 2)["files"]["ema.safetensors"]["sha256"]
    name = "ema.safetensors"
    training = training_of(manifest(source, 2))
    expected = {"path": str(step), "file": name, "sha256": digest, "step": 2, "training": training}
    assert record["init"] == expected
    assert manifest(source, 2)["init"] is None
    # The run goes on by itself: where its weights came from is not looked at again, and not forgotten.
    trained(still(columns, tmp_path, steps=2, init_from=str(tmp_path / "gone")))
    assert manifest(run, 2)["init"] == record["init"]


def test_from_the_weights_of_a_step(columns: Path, source: Path, tmp_path: Path) -> None:
    step = step_folder(source, 2)
    run = trained(still(columns, tmp_path, init_from=str(step), init_ema=False))
    assert_starts_as(run, step / "weights.safetensors")
    weights, average = (load_file(step / f"{n}.safetensors") for n in ("weights", "ema"))
    assert not torch.equal(weights["proj_out.weight"], average["proj_out.weight"])


def test_weights_that_say_something_else_are_named(
    columns: Path, source: Path, tmp_path: Path
) -> None:
    """A model of latents that starts from one of velocities trains, but not from what that has learned."""
    config = still(columns, tmp_path, init_from=str(source))
    assert "found a model whose output is" not in fitted(config)[1]
    config = {**config, "runs": str(tmp_path / "other"), "flow": {"prediction": "latent"}}
    code, output, _ = fitted(config)
    assert code == 0, output
    assert "found a model whose output is the velocity, expected the latent" in output


def imported(step: Path, out: Path, **changes: Any) -> Path:
    """A step as `train import` writes one: weights alone."""
    folder = out / step.name
    folder.mkdir(parents=True)
    names = ("weights.safetensors", "ema.safetensors")
    for name in names:
        shutil.copy(step / name, folder / name)
    record = json.loads((step / "manifest.json").read_text())
    fields = {k: record[k] for k in ("format", "version", "step", "model")}
    files = {name: record["files"][name] for name in names}
    values = {**fields, "source": "reference", "world": 0, "files": files, **changes}
    (folder / "manifest.json").write_bytes(seal(values))
    return out


def test_what_was_imported(columns: Path, source: Path, tmp_path: Path) -> None:
    out = imported(step_folder(source, 2), tmp_path / "imported")
    run = trained(still(columns, tmp_path, init_from=str(out)))
    assert_starts_as(run, step_folder(source, 2) / "ema.safetensors")


def model_of(config: dict[str, Any]) -> tuple[TrainConfig, DiTConfig]:
    checked = TrainConfig.model_validate(config)
    return checked, model_config(checked, shape_of(open_columns(checked, None)))


def test_the_table_of_positions_follows_from_the_latents(columns: Path, tmp_path: Path) -> None:
    """Latents of 8 x 8 are 4 x 4 tokens; what a run or its initial weights have is kept."""
    config = tiny_config(columns, tmp_path, steps=1, save_every=1)
    run = trained(config)
    sizes = {"pos_embed_max_size": 16, "sample_size": 8}
    assert sizes.items() <= manifest(run, 1)["model"].items()
    assert sizes.items() <= yaml.safe_load((run / "config.yaml").read_text())["model"].items()
    model = {**config["model"], "pos_embed_max_size": 64, "sample_size": 32}  # as releases before
    old = trained({**config, "model": model, "runs": str(tmp_path / "old")})
    trained({**config, "runs": str(tmp_path / "old"), "steps": 2})
    runs = str(tmp_path / "new")
    new = trained({**config, "runs": runs, "init_from": str(old)})
    for step in (manifest(old, 2), manifest(new, 1)):
        assert (step["model"]["pos_embed_max_size"], step["model"]["sample_size"]) == (64, 32)
    from_old = TrainConfig.model_validate({**config, "init_from": str(old)})
    expected, recorded = (training_of(r) for r in (expected_record(from_old), manifest(new, 1)))
    assert compared(expected, recorded).all == {}
    assert expected["init"] == recorded["init"]


def test_no_validation(columns: Path) -> None:
    config = TrainConfig.model_validate({**tiny_config(columns, columns), "validation": None})
    assert config == TrainConfig.model_validate(tiny_config(columns, columns))
    assert config.validation.source is None


def write_latents(folder: Path, columns: Path, channels: int, side: int) -> None:
    """`folder/toy` with other latents beside the same text."""
    (folder / "toy").mkdir(parents=True)
    (folder / "toy/text").symlink_to(columns / "toy/text")
    moments = torch.randn(150, 2 * channels, side, side, generator=torch.Generator().manual_seed(1))
    layout = Layout("moments", (2 * channels, side, side), 1)
    identity = {"source": "toy", "encoder": "another"}
    spec = ColumnSpec(identity, layout, Norm((0.1,), (0.8,)))
    write_column(folder / "toy/vae", spec, moments.half().numpy())


def test_the_weights_must_fit(columns: Path, source: Path, tmp_path: Path) -> None:
    """Before a model is built, and before anything is written."""
    write_latents(tmp_path, columns, CHANNELS + 2, SIDE)
    code, output, run = fitted(still(tmp_path, tmp_path / "runs", init_from=str(source)))
    assert code == 2
    assert "model.in_channels: found 4, expected 6" in output
    assert not run.exists()
    wider = {**still(columns, tmp_path)["model"], "hidden_size": 64, "initializer_range": 0.5}
    result = model_of(still(columns, tmp_path, init_from=str(source), model=wider))
    with pytest.raises(ConfigError, match="model.hidden_size: found 32, expected 64") as error:
        init_weights.find_initial(*result)
    assert "initializer_range" not in str(error.value)


def test_larger_pictures_go_on_from_smaller_ones(
    columns: Path, source: Path, tmp_path: Path
) -> None:
    """256 px to 512 px: the same table of positions, of which more is used."""
    write_latents(tmp_path, columns, CHANNELS, 2 * SIDE)
    config = still(tmp_path, tmp_path / "runs", init_from=str(source))
    run = trained(config)
    assert_starts_as(run, step_folder(source, 2) / "ema.safetensors")
    assert losses(run)[1] > 0


def test_what_cannot_be_read(columns: Path, source: Path, tmp_path: Path) -> None:
    config, model = model_of(still(columns, tmp_path))
    assert init_weights.find_initial(config, model) is None

    def find(path: Path, ema: bool = True) -> Any:
        return init_weights.find_initial(
            config.model_copy(update={"init_from": path, "init_ema": ema}), model
        )

    with pytest.raises(CheckpointError, match="found no checkpoint in .*nowhere, expected a run"):
        find(tmp_path / "nowhere")
    step = step_folder(source, 2)
    record = json.loads((step / "manifest.json").read_text())
    alone = {"weights.safetensors": record["files"]["weights.safetensors"]}
    out = imported(step, tmp_path / "alone", files=alone)
    with pytest.raises(CheckpointError, match=r"holds weights.safetensors, expected ema.*=false"):
        find(out)
    assert find(out, ema=False).name == "weights.safetensors"
    path = imported(step, tmp_path / "torn") / step.name / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is damaged"):
        find(tmp_path / "torn")


def test_damaged_weights_are_not_taken(columns: Path, source: Path, tmp_path: Path) -> None:
    out = imported(step_folder(source, 2), tmp_path / "out")
    file = out / "step-00000002/ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        verified(file.parent)
    code, output, run = fitted(still(columns, tmp_path, init_from=str(out)))
    assert code == 2
    assert "ema.safetensors is not the" in output
    assert not (run / "checkpoints").exists()
