"""The checkpoint format, without training: whole or refused, and readable by any number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint
from train.checkpoint import CheckpointError, ResumeRefused, State
from train.engine import Fragment
from train.model import DiT, DiTConfig
from train.world import World

ALONE = World(0, 1, torch.device("cpu"))
MODEL = DiT(
    DiTConfig(
        hidden_size=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_size=24,
        pos_embed_max_size=4,
        sample_size=4,
        in_channels=2,
        out_channels=2,
        text_width=6,
    )  # fmt: skip
)
TOTALS = {name: p.numel() for name, p in MODEL.named_parameters()}
RECORD: dict[str, Any] = {
    "objective": {"flow": {"shift": 3.0}, "caption_dropout": 0.1},
    "position": 0, "model": MODEL.config.model_dump(mode="json"), "data": {"latents": {"complete": "abc"}},
    "order": {"seed": 0, "lanes": 8, "window": 0}, "optimizer": {"kind": "adamw", "step": 1},
}  # fmt: skip


def part(start: int, stop: int) -> tuple[list[Fragment], list[tuple[str, int, int]]]:
    """Fragments of the elements [start, stop) of all parameters laid end to end, as ZeRO cuts them."""
    fragments, at = [], 0
    for name, total in TOTALS.items():
        low, high = max(start, at), min(stop, at + total)
        if low < high:
            fragments.append(Fragment(name, low - at, high - at, 0, low - start))
        at += total
    return fragments, [(f.name, f.start, f.stop) for f in fragments]


def state_of(start: int, stop: int, value: float) -> State:
    """Elements numbered from `start`; kind k adds k * 1e6."""
    numbers = torch.arange(start, stop, dtype=torch.float32) + value
    flats = {kind: [numbers + 1e6 * k] for k, kind in enumerate(checkpoint.KINDS)}
    return State(part(start, stop)[0], TOTALS, flats)


SIZE = sum(TOTALS.values())


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(
        folder, state_of(0, SIZE, step), MODEL, {**RECORD, "step": step}, ALONE, keep=2
    )


def test_any_part_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = checkpoint.verified(path)
    cuts = [0, 7, SIZE // 3, SIZE // 3 + 1, SIZE]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        blank = State(
            part(start, stop)[0], TOTALS, {k: [torch.zeros(stop - start)] for k in checkpoint.KINDS}
        )
        loaded = checkpoint.load(path, manifest, blank)
        for kind, wanted in state_of(start, stop, 1).flats.items():
            assert torch.equal(loaded.flats[kind][0], wanted[0])


def test_whole_weights_and_average_stand_beside(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    weights, ema = load_file(path / "weights.safetensors"), load_file(path / "ema.safetensors")
    assert weights.keys() == MODEL.state_dict().keys()
    flat = torch.cat([weights[name].flatten() for name in TOTALS])
    assert torch.equal(flat, torch.arange(SIZE, dtype=torch.float32) + 1)
    assert torch.equal(torch.cat([ema[name].flatten() for name in TOTALS]), flat + 3e6)
    sampled, manifest = checkpoint.load_for_sampling(path)
    assert torch.equal(sampled.state_dict()["proj_out.bias"], ema["proj_out.bias"])
    assert manifest["model"]["hidden_size"] == 16


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000010",
        "step-00000015",
    ]
    assert (tmp_path / "latest").read_text() == "step-00000015\n"
    (tmp_path / "latest").write_text("step-00000099\n")  # a hint for people, nothing else
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000015"


@pytest.mark.parametrize(
    "name", ["manifest.json", "state-00000-of-00001.safetensors", "ema.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_damaged_file_sends_to_the_checkpoint_before(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"x"}[damage])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text
    assert name in caplog.text
    save(tmp_path, 2)  # trained again, it takes the place of the damaged one
    again = checkpoint.newest(tmp_path)
    assert again is not None
    assert again[0].name == "step-00000002"


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.verified(path.parent, names=[])


def test_nothing_whole_is_an_error_and_nothing_at_all_is_a_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    shutil.rmtree(save(tmp_path, 1) / "manifest.json", ignore_errors=True)
    (tmp_path / "step-00000001/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        checkpoint.newest(tmp_path)


def test_a_failed_save_leaves_what_stands(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".staging-step-00000002").write_text(
        "in the way"
    )  # rmtree leaves a file alone, mkdir fails
    with pytest.raises(CheckpointError, match="rank 0"):
        save(tmp_path, 2)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000001"


def test_another_run_is_refused_with_the_fields(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = checkpoint.verified(path)
    checkpoint.refuse_other_run(path, manifest, RECORD)
    other = {
        **RECORD,
        "data": {"latents": {"complete": "xyz"}},
        "order": {"seed": 1, "lanes": 8, "window": 1024},
        "model": {**RECORD["model"], "layers": 3},
        "objective": {**RECORD["objective"], "caption_dropout": 0.2},
    }
    with pytest.raises(ResumeRefused) as caught:
        checkpoint.refuse_other_run(path, manifest, other)
    for field in (
        "data.latents.complete",
        "order.seed",
        "order.window",
        "model.layers",
        "objective.caption_dropout",
    ):
        assert f"{field}: found" in str(caught.value)
    assert "order.lanes" not in str(caught.value)
