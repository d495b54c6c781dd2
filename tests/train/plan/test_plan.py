"""What `train plan` says, beside figures worked out elsewhere: memory and FLOPs of the reference, and by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from configs import ConfigError, load
from shards import Column
from tests.commands.lines import next_lines
from tests.train.conftest import CHANNELS, ROOT, SIDE, TINY, WIDTH, tiny_config
from tests.train.here import trained
from tests.train.model.test_flops import SMALL, THREE_B
from train.__main__ import main
from train.config import TrainConfig
from train.model.dit import DiT, DiTConfig
from train.model.flops import GPUS, training
from train.plan.caching_speedup import Efficiency, gemma, savings
from train.plan.estimate import RunPlan, Setting, make_plan
from train.plan.memory import activations, by_stage
from train.plan.plan import as_text
from train.plan.survey import summarise, with_rows

CONFIGS = ROOT / "configs/train"
P = 2_660_490_816


def plan_of(*words: str, gpus: int = 32, rows: list[float] | None = None) -> RunPlan:
    config = load(TrainConfig, CONFIGS / "dit3b_256.yaml", ["data.root=/nowhere", *words])
    data = summarise(config)
    if rows:
        data = with_rows(data, rows)
    return make_plan(config, data, Setting(gpus, GPUS["h100"], Efficiency(), 2.5))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", "plan", *words])
    return main()


# On paper ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "shares", "by_flops", "by_time"),
    [
        (256, (0.301, 0.327), (1.43, 1.49), (1.45, 1.54)),
        (512, (0.148, 0.185), (1.17, 1.23), (1.22, 1.30)),
    ],
)
def test_cached_over_online(
    side: int, shares: tuple[float, ...], by_flops: tuple[float, ...], by_time: tuple[float, ...]
) -> None:
    result = savings(training(THREE_B, side // 8, side // 8), side, 100, Efficiency())
    padded = [s for s in result if s.tokens == 256]
    assert [s.vae for s in padded] == ["FLUX, SD-3.5", "Qwen-Image"]
    assert [s.share for s in padded] == pytest.approx(shares, abs=6e-4)
    assert [s.by_flops for s in padded] == pytest.approx(by_flops, abs=6e-3)
    assert [s.by_time for s in padded] == pytest.approx(by_time, abs=6e-3)
    short = {256: (0.187, 0.223), 512: (0.111, 0.152)}[side]
    assert [s.share for s in result if s.tokens == 100] == pytest.approx(short, abs=1e-3)
    assert savings(training(THREE_B, 48, 48), 384, 100, Efficiency()) == []


@pytest.mark.parametrize(
    ("tokens", "gflop"), [(64, 254), (100, 398), (128, 510), (256, 1024.3), (512, 2068)]
)
def test_gemma_as_counted(tokens: int, gflop: float) -> None:
    assert gemma(tokens) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_memory_of_the_reference_and_of_zero() -> None:
    gb = {k: v / 1e9 for k, v in by_stage(0, 32, P, P, 0).items()}
    assert gb["weights"] == gb["gradients"] == pytest.approx(10.64, abs=0.01)
    assert gb["AdamW's moments"] == pytest.approx(21.28, abs=0.01)
    assert gb["average of the weights"] == pytest.approx(10.64, abs=0.01)
    assert gb["Gemma-2B in fp32"] == pytest.approx(10.0, abs=0.05)
    first, two = (by_stage(stage, 32, P, P, 200_000_000) for stage in (1, 2))
    assert first["average of the weights"] / 1e9 == pytest.approx(0.33, abs=0.01)
    assert first["gradients"] == 4 * P * (1 + 1 / 32)
    assert two["gradients"] == 4 * P * 2 / 32 + 800_000_000
    assert sum(two.values()) < sum(first.values()) < sum(by_stage(0, 32, P, P, 0).values())


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "cross", "qk_norm": False}, {"sandwich_norm": True}], ids=str
)
def test_the_estimate_of_activations(changes: dict[str, Any]) -> None:
    """Beside what autograd keeps on a CPU in fp32: there, norms keep what they have normalised beside their input, and
    key heads are repeated for the query heads. The estimate is for blocks alone and may be a fifth off."""
    config = DiTConfig(**SMALL | {"head_dim": 16, "layers": 4} | changes)
    model, tokens = DiT(config), 3
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > 64:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    inputs = (
        torch.randn(4, 6, 16, 16), torch.full((4,), 500.0), torch.randn(4, tokens, 48),
        torch.ones(4, tokens, dtype=torch.int64),
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(*inputs)
    places, q, kv = 64, 64, 32
    norms = 2 * 64 * (2 if config.sandwich_norm else 1) + (q + kv if config.qk_norm else 0)
    repeated = 2 * (q - kv) * (places + tokens)
    on_cpu = 4 * config.layers * (places * norms + repeated)
    assert sum(sizes.values()) / 4 == pytest.approx(
        activations(config, 16, 16, tokens, half=4) + on_cpu, rel=0.2
    )
    assert activations(config, 16, 16, tokens, recompute=True) < 0.5 * activations(
        config, 16, 16, tokens
    )


# Of a config ---------------------------------------------------------------------------------------------------------


def test_the_reference_run_on_h100s() -> None:
    """1,081 GPU hours at 40 % of 989 TFLOP/s with captions of 256 tokens, 0.243 s a step on 32."""
    config = load(TrainConfig, CONFIGS / "dit3b_256.yaml", ["data.root=/nowhere"])
    data = replace(with_rows(summarise(config), [27.2e6, 4.77e6]), tokens=256)
    plan = make_plan(config, data, Setting(32, GPUS["h100"], Efficiency(), 2.5))
    assert sum(plan.parameters.values()) == P
    assert plan.gpu_hours == pytest.approx(1081, rel=2e-3)
    assert plan.samples_per_second == pytest.approx(4210, rel=2e-3)
    assert plan.accumulation == 1
    assert plan.stage == 2
    epochs = plan.epochs()
    assert epochs["blip3o-long"][0] == pytest.approx(27.2e6 / (0.595 * 1024))
    assert epochs["blip3o-short"][1] == pytest.approx(500_000 * 1024 * 0.405 / 4.77e6)


def test_bytes_where_there_are_no_columns() -> None:
    data = plan_of().data
    assert data.latent_bytes == 65_536  # mean and logvar, 16 x 32 x 32, two bytes
    assert data.token_bytes == 4096
    assert data.sample_bytes == pytest.approx(65_536 + 121 * 4096)
    assert data.rows is None
    assert any("blip3o-long/flux-256" in note for note in data.notes)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="1024 cannot be cut into micro-batches of 32 on 3 ranks"):
        plan_of(gpus=3)
    with pytest.raises(ConfigError, match="found 1 numbers, expected one for each of the sources"):
        plan_of(rows=[1e6])


def test_of_columns_that_are_there(columns: Path, tmp_path: Path) -> None:
    values = tiny_config(columns, tmp_path)
    config = TrainConfig.model_validate(values)
    plan = make_plan(config, summarise(config), Setting(2, None, Efficiency(), None))
    (source,) = plan.data.sources
    assert (source.name, source.share, source.rows) == ("toy", None, 150)
    assert plan.data.latent_bytes == 2 * 2 * CHANNELS * SIDE * SIDE
    assert plan.data.token_bytes == 2 * WIDTH
    text = Column.open(columns / "toy/text")
    assert plan.data.tokens == pytest.approx(text.lengths(torch.arange(150).numpy()).mean())
    assert plan.epochs() == {"toy": (150 / 16, 20 * 16 / 150)}
    assert plan.gpu_hours is None
    model = DiT(DiTConfig(**TINY, in_channels=CHANNELS, out_channels=CHANNELS, text_width=WIDTH))
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())


def test_columns_of_other_sizes_than_expected(columns: Path, tmp_path: Path) -> None:
    values = tiny_config(columns, tmp_path)
    values["data"]["expect"] = {"channels": 16, "height": 8, "width": 8, "text_width": 12}
    config = TrainConfig.model_validate(values)
    with pytest.raises(ConfigError, match="found channels 4, data.expect says 16"):
        make_plan(config, summarise(config), Setting(1, None, Efficiency(), None))


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_without_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    words = [
        str(CONFIGS / "flux-e2e-256.yaml"), "--gpu", "h100", "data.root=/nowhere", "--gpus", "32",
        "--price-per-gpu-hour", "2.5", "--samples", "27.2e6,4.77e6", "--json", str(path), "micro_batch=16",
    ]  # fmt: skip
    assert run(monkeypatch, *words) == 0
    out, record = capsys.readouterr().out, json.loads(path.read_text())
    assert "2,660,490,816 parameters" in out
    assert "captions padded to 256: 1 T, 3.01 T" in out
    assert "mix: blip3o-long 0.595" in out
    assert not next_lines(out)  # nothing can be trained yet
    assert "ZeRO 2, this config" in out
    assert "32 GPUs x 2 micro-batches x 16" in out
    assert record["parameters"] == P
    assert record["price"] == pytest.approx(2.5 * record["gpu_hours"])
    assert record["read_bytes_per_second"] == pytest.approx(
        record["samples_per_second"] * (65_536 + 121 * 4096)
    )


def test_no_gpu_no_time(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    columns: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(columns, tmp_path)))
    assert run(monkeypatch, str(path)) == 0
    out = capsys.readouterr().out
    assert "time: no GPU is named: give --gpu" in out
    assert "epoch of toy: 9 steps" in out
    assert run(monkeypatch, str(path), "--peak-tflops", "1", "--mfu", "0.5") == 0
    assert "time on 1 GPUs at 50% of 1 TFLOP/s (assumed)" in capsys.readouterr().out


def test_what_is_said_of_captions_and_rows_beside_columns(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    columns: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--tokens counts, also where several latents are set side by side; --samples does not, which is said."""
    path, record = tmp_path / "tiny.yaml", tmp_path / "plan.json"
    path.write_text(yaml.safe_dump(tiny_config(columns, tmp_path)))
    latents = ("--latents", str(columns / "toy/vae"), "--json", str(record))
    flops = []
    for tokens in ("100", "200"):
        assert run(monkeypatch, str(path), *latents, "--tokens", tokens) == 0
        flops.append(json.loads(record.read_text())[0]["flops_a_sample"])
    config = DiTConfig(**TINY, in_channels=CHANNELS, out_channels=CHANNELS, text_width=WIDTH)
    assert flops[1] - flops[0] == 100 * training(config, SIDE, SIDE).token
    capsys.readouterr()
    assert run(monkeypatch, str(path), "--samples", "1e6") == 0
    out = capsys.readouterr().out
    assert "epoch of toy: 9 steps" in out
    assert "--samples is left aside" in out


def test_neither_columns_nor_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, tmp_path)))
    with pytest.raises(ConfigError, match=r"no such folder.*give their sizes: data.expect"):
        run(monkeypatch, str(path))


def test_bytes_on_disk(columns: Path, tmp_path: Path) -> None:
    """Counted by the files that a run writes: a checkpoint, and the snapshots of power averages."""
    ema = {"decay": 0.9, "power": [0.05, 0.1], "snapshots": 3}
    values = tiny_config(
        columns, tmp_path, steps=6, save_every=6, ema=ema, model={**TINY, "hidden_size": 128}
    )
    config = TrainConfig.model_validate(values)
    plan = make_plan(config, summarise(config), Setting(1, None, Efficiency(), None))
    run = trained(values)
    for planned, folder in (
        (plan.checkpoint_bytes, run / "checkpoints"),
        (plan.snapshot_bytes, run / "ema-snapshots"),
    ):
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        assert planned == pytest.approx(size, rel=0.05)
    assert plan.snapshot_bytes == 3 * 2 * 2 * sum(plan.parameters.values())
    part = sum(plan.parameters.values()) * 4.0
    assert plan.memory[1]["power averages of them"] == 2 * part
    text = as_text(plan)
    assert "disk: a checkpoint is" in text
    assert "; the snapshots of ema.power are" in text
