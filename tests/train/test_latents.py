"""What follows the latent: shift, patch and positions of one config on columns of any shape; validation whatever the
shift; and a model whose output is the latent."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from encode.config import EncodeConfig
from encode.run.job import run as encode
from eval.images.sampler import sample
from shards import ColumnSpec, Layout, Norm, open_join
from tests.encode.tiny_models import save_dc, save_hunyuan, save_rae
from tests.encode.toy import save_gemma, save_kl, write_source
from tests.train.conftest import TINY, tiny_config, words, write_column
from tests.train.here import fitted, losses, manifest, trained
from train.__main__ import main
from train.checkpoints.checkpoint import CheckpointError, load_for_sampling
from train.checkpoints.reference import export

SIDE, WIDTH = 4, 8


# name -> kind, C x H x W, and what one config makes of it: tokens, values of each, shift
SHAPES = {
    "flux": ("moments", (16, 32, 32), 256, 64, 2.0),
    "sd": ("moments", (4, 32, 32), 256, 16, 1.0),
    "hunyuan-image": ("moments", (64, 8, 8), 64, 64, 1.0),
    "dc-ae": ("latents", (32, 8, 8), 64, 32, 0.5**0.5),
    "rae": ("latents", (768, 16, 16), 256, 768, 48**0.5),
    "one-dimensional": ("latents", (32, 1, 64), 64, 32, 0.5**0.5),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Columns of latents as these tokenizers make them, of random numbers, and their text; eight rows each."""
    folder = tmp_path_factory.mktemp("shapes")
    g = np.random.default_rng(0)
    for name, (kind, shape, *_) in SHAPES.items():
        channels = shape[0] * (2 if kind == "moments" else 1)
        values = g.standard_normal((8, channels, *shape[1:])).astype(np.float16)
        spec = ColumnSpec(
            {"source": "s", "encoder": name}, Layout(kind, values.shape[1:], 1), Norm((0.0,), (1.0,))
        )  # fmt: skip
        write_column(folder / name, spec, values)
    spec = ColumnSpec({"source": "s", "encoder": "text"}, Layout("tokens", (2, WIDTH), 1), None, 1)
    captions = [words(torch.randn(2, WIDTH)) for _ in range(8)]
    write_column(folder / "text", spec, captions, words(torch.zeros(1, WIDTH)))
    return folder


def any_latent(folder: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """One config for all of them: as wide as RAE's tokens, and with the sizes of the reference's table."""
    model = {
        "hidden_size": 768, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_size": 16,
        "patch_size": "auto", "pos_embed_max_size": 64, "sample_size": 32,
    }  # fmt: skip
    values = tiny_config(folder, runs, steps=1, global_batch=4, micro_batch=4, **changes)
    data = {"latents": str(folder / "flux"), "text": str(folder / "text"), "lanes": 4}
    return {**values, "model": model, "flow": {"shift": "auto"}, "data": data}


def records(run: Path, key: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


# Any latent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_one_config_trains_on_any_latents(shapes: Path, tmp_path: Path, name: str) -> None:
    """By `data.latents` alone; what followed is said when the run starts, and recorded as numbers."""
    _, (channels, height, width), tokens, values, shift = SHAPES[name]
    config = any_latent(shapes, tmp_path)
    config["data"]["latents"] = str(shapes / name)
    code, output, run = fitted(config)
    assert code == 0, output
    positions = {
        "one-dimensional": "1d-rope",
        "hunyuan-image": "ape, 7 to 8.75",
        "dc-ae": "ape, 7 to 8.75",
    }
    said = positions.get(name, "ape, 6 to 9.75")
    assert f"tokens of a picture: {tokens} of {values} values" in output
    assert f"positions {said}" in output
    assert f"noise levels: shift {shift:.4g}" in output
    assert ("below 1" in output) == (shift < 1)
    (start,) = records(run, "start")
    assert (start["image_tokens"], start["token_values"]) == (tokens, values)
    assert (start["shift"], start["positions"]) == (shift, said)
    record = manifest(run, 1)
    patch = int((height * width / tokens) ** 0.5)
    assert record["model"]["patch_size"] == start["patch_size"] == patch
    assert record["model"]["in_channels"] == channels
    assert "image_tokens" not in record["model"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["model"]["patch_size"], saved["flow"]["shift"]) == (patch, shift)
    page = (run / "page.html").read_text()
    assert f"{tokens} of {values} values, positions {said}" in page
    assert fitted({**config, "steps": 2})[0] == 0  # goes on
    assert fitted({**saved, "steps": 3})[0] == 0  # also from the numbers


def test_tokens_wider_than_the_model_are_trained_as_latents_alone(
    shapes: Path, tmp_path: Path
) -> None:
    config = any_latent(shapes, tmp_path)
    config["data"]["latents"] = str(shapes / "rae")
    config["model"]["hidden_size"] = 64
    code, output, run = fitted(config)
    assert code == 2
    assert "768 x 1 x 1 = 768 values and a model of width 64" in output
    assert "model.hidden_size=768 or more, or flow.prediction=latent" in output
    assert not run.exists()
    code, output, _ = fitted({**config, "flow": {"shift": "auto", "prediction": "latent"}})
    assert code == 0, output
    assert "note: found tokens of 768 x 1 x 1 = 768 values" in output


def test_a_run_of_before_whose_tokens_are_wider_goes_on(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = any_latent(shapes, tmp_path)
    config["data"]["latents"] = str(shapes / "rae")
    config["model"]["hidden_size"] = 64
    with monkeypatch.context() as patch:
        patch.setattr("train.run.refuse_narrow", lambda *_: None)  # as releases before
        trained(config)
    assert fitted(config)[0] == fitted({**config, "steps": 2})[0] == 0


def test_a_plan_of_several_latents_is_side_by_side(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Within 60 columns, also where `data.expect` has the sizes of another column; the FLOPs are those of each plan."""
    config = any_latent(shapes, tmp_path)
    config["data"]["expect"] = {"channels": 16, "height": 32, "width": 32, "text_width": WIDTH}
    path, out = tmp_path / "any.yaml", tmp_path / "plan.json"
    path.write_text(yaml.safe_dump(config))
    columns = [str(shapes / name) for name in SHAPES]

    def plan(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", "plan", str(path), *words])
        return main()

    assert plan("--latents", *columns, "--json", str(out)) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    made = json.loads(out.read_text())
    for record, (name, (_, shape, tokens, values, shift)) in zip(made, SHAPES.items(), strict=True):
        assert (record["latents"], record["shape"]) == (str(shapes / name), list(shape))
        assert (record["image_tokens"], record["values"]) == (tokens, values)
        assert record["shift"] == pytest.approx(shift)
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1:6] == [
            "x".join(map(str, shape)), str(record["patch"]), str(tokens), str(values), f"{shift:.3g}"
        ]  # fmt: skip
    assert "one shift" not in text
    assert plan("--latents", columns[3], columns[4]) == 0  # of patch 1, and 64 and 256 tokens
    assert "one patch" not in capsys.readouterr().out
    assert "one patch" not in text
    fixed = ("flow.shift=3", "model.patch_size=1", "--latents")
    assert plan(*fixed, columns[0], columns[1], columns[3]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "one shift, 3, for latents of other dimensions: flow.shift=auto follows them" in text
    assert "one patch, 1, and 64 or 1,024 tokens: model.patch_size=auto" in text
    assert plan(*fixed, columns[1], columns[1]) == 0
    assert "one " not in capsys.readouterr().out
    assert plan("data.expect=null", f"data.latents={columns[1]}", "--json", str(out)) == 0
    assert "tokens of a picture: 256 of 16 values" in capsys.readouterr().out
    flops = json.loads(out.read_text())["flops_a_sample"]["training"]
    assert flops == made[1]["flops_a_sample"]
    assert plan("model.hidden_size=64", "--latents", *columns[:2], columns[4]) == 2
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    assert "768 x 1 x 1 = 768 values and a model of width 64" in " ".join(text.split())


# name -> C x H x W of a picture of 32 x 32, and what one config of 16 tokens makes of it: patch, tokens, values, shift
ENCODED = {
    "flux": ((16, 4, 4), 1, 16, 16, 0.25),
    "sd": ((4, 4, 4), 1, 16, 4, 0.125),
    "hunyuan-image": ((8, 8, 8), 2, 16, 32, 0.125**0.5),
    "dc-ae": ((8, 2, 2), 1, 4, 8, 2**-3.5),
    "rae": ((64, 4, 4), 1, 16, 64, 0.5),
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Columns that tiny models of these tokenizers' own classes made of the same 16 pictures, and their text."""
    folder = tmp_path_factory.mktemp("encoded")
    save_kl(folder / "flux")
    save_kl(folder / "sd", latent_channels=4, shift_factor=None, scaling_factor=0.18215)
    save_hunyuan(folder / "hunyuan-image")
    save_dc(folder / "dc-ae", stages=5)
    save_rae(folder / "rae")
    save_gemma(folder / "gemma")
    classes = {
        "hunyuan-image": "AutoencoderKLHunyuanImage",
        "dc-ae": "AutoencoderDC",
        "rae": "AutoencoderRAE",
    }
    columns: dict[str, Any] = {
        name: {
            "kind": "latents" if name in ("dc-ae", "rae") else "moments", "resolution": 32,
            "encoder": {"class": classes.get(name, "AutoencoderKL"), "path": str(folder / name)},
        }
        for name in ENCODED
    }  # fmt: skip
    text = {"class": "GemmaModel", "path": str(folder / "gemma")}
    columns["text"] = {"kind": "tokens", "encoder": text, "max_tokens": 24}
    values = {
        "root": str(folder / "cache"), "sources": {"s": write_source(folder / "tars", 1, 16)}, "columns": columns,
        "shard_rows": 1024, "engine": {"executor": "inline", "device": "cpu", "batch": 8},
    }  # fmt: skip
    encode(EncodeConfig.model_validate(values))
    return folder / "cache/s"


@pytest.mark.parametrize("name", ENCODED)
def test_one_config_trains_on_what_any_tokenizer_encodes(
    encoded: Path, tmp_path: Path, name: str
) -> None:
    """By `data.latents` alone, with equal tokens where the latents have as many places."""
    shape, patch, tokens, values, shift = ENCODED[name]
    config: dict[str, Any] = tiny_config(encoded, tmp_path, steps=3, flow={"shift": "auto"})
    config["model"] = {**TINY, "hidden_size": 64, "patch_size": "auto", "image_tokens": 16}
    config["data"] = {"latents": str(encoded / name), "text": str(encoded / "text"), "lanes": 4}
    assert open_join(encoded / name, encoded / "text").latent_shape == shape
    code, output, run = fitted({**config, "global_batch": 4, "micro_batch": 4})
    assert code == 0, output
    assert f"tokens of a picture: {tokens} of {values} values" in output
    assert f"noise levels: shift {shift:.4g}" in output
    (start,) = records(run, "start")
    assert (start["patch_size"], start["image_tokens"], start["token_values"]) == (
        patch,
        tokens,
        values,
    )
    assert start["shift"] == pytest.approx(shift)
    assert all(0 < loss < 10 for loss in losses(run).values())


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
    assert "objective.flow.shift: found 0.25, expected 3.0" in output
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
    if prediction == "latent":  # which the reference's tools would take for a velocity
        with pytest.raises(CheckpointError, match="output is the latent, expected a velocity"):
            export(run / "checkpoints/step-00000400", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export(run / "checkpoints/step-00000400", tmp_path / "flat", "safetensors")
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().max() < 0.35
