"""The reference's checkpoint directory: in, out, and what is refused."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import ConfigError
from eval.images.sampler import sample
from tests.train.goldens import golden
from train.__main__ import main
from train.checkpoints.checkpoint import CheckpointError, load_for_sampling, verified
from train.checkpoints.reference import STATES, BadReference, export, import_reference, read
from train.model.dit import DiT, DiTConfig

ROOT = Path(__file__).parents[3]

BASE = {
    "model_type": "gemma", "_name_or_path": "google/gemma-2b", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "transformers_version": "4.43.3",
}  # fmt: skip
FIELDS = {
    "model_type": "DiT", "base_config": BASE, "dit_num_hidden_layers": 2, "in_channels": 4, "out_channels": 4,
    "pos_embed": "ape", "pos_embed_max_size": 8, "qk_norm": True, "text_hidden_size": 12,
    "text_modulation_embeds_dim": 20,
}  # fmt: skip


def state_of(seed: int) -> dict[str, Tensor]:
    return DiT(DiTConfig.from_reference(FIELDS), seed).state_dict()


def write(folder: Path, step: int, content: Any, fields: Any = FIELDS) -> Path:
    (folder / str(step)).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "latest").write_text(str(step))
    torch.save(content, folder / str(step) / STATES)
    return folder


def whole(seed: int = 1, **changes: Any) -> dict[str, Any]:
    """What DeepSpeed writes at stage 0, with the average that the reference adds."""
    module = state_of(seed)
    moments = {0: {"step": 7, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    return {
        "module": {f"_orig_mod.{k}": v for k, v in module.items()}, "buffer_names": ["patch_embed.pos_embed"],
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "param_shapes": [{"proj_out.bias": torch.Size([16])}], "lr_scheduler": {"last_batch_iteration": 6},
        "sparse_tensor_module_names": set(), "skipped_steps": 0, "global_steps": 7, "dp_world_size": 32,
        "ds_config": {"train_batch_size": 1024}, "ds_version": "0.15.1", "ema": state_of(seed + 1), **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write(folder, 50_000, whole(1))
    return write(folder, 100_000, whole(3))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_read_as_it_is(original: Path) -> None:
    config, state = read(original)  # the last step, its average
    assert config == DiTConfig.from_reference(FIELDS)
    assert same(state, state_of(4))
    assert same(read(original, 50_000, ema=False)[1], state_of(1))
    DiT(config).load_state_dict(state)


def test_imported_it_is_a_step_like_ours(original: Path, tmp_path: Path) -> None:
    path = import_reference(original, 50_000, tmp_path / "ours")
    assert path == tmp_path / "ours/step-00050000"
    manifest = verified(path)
    assert (manifest["source"], manifest["world"], manifest["step"]) == ("reference", 0, 50_000)
    assert not list(path.glob("state-*"))
    for where in (path, tmp_path / "ours"):
        average, result = load_for_sampling(where)
        assert same(average.state_dict(), state_of(2))
        assert not average.training
        assert all(p.requires_grad for p in average.parameters())
        assert result == manifest
    assert same(load_for_sampling(path, ema=False)[0].state_dict(), state_of(1))
    with pytest.raises(CheckpointError, match="exists already"):
        import_reference(original, 50_000, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="python -m train import"):
        load_for_sampling(original)


def test_there_and_back(original: Path, tmp_path: Path) -> None:
    step = import_reference(original, None, tmp_path / "ours")
    back = export(step, tmp_path / "back")
    assert json.loads((back / "config.json").read_text()) == FIELDS  # the language model's name too
    assert (back / "latest").read_text() == "100000"
    content = torch.load(back / "100000" / STATES, weights_only=True)
    assert (content["global_steps"], content["dp_world_size"]) == (
        100_000,
        1,
    )  # as DeepSpeed wants it
    assert same(content["module"], state_of(3))
    assert same(content["ema"], state_of(4))
    again = import_reference(back, 100_000, tmp_path / "again")
    for name in ("weights.safetensors", "ema.safetensors"):
        assert (again / name).read_bytes() == (step / name).read_bytes()


def test_weights_alone(original: Path, tmp_path: Path) -> None:
    step = import_reference(original, None, tmp_path / "ours")
    out = export(step, tmp_path / "flat", "safetensors")
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    fields = json.loads((out / "config.json").read_text())
    assert fields.pop("_class_name") == "DiT"
    model = DiT(DiTConfig.model_validate(fields))
    model.load_state_dict(load_file(out / "diffusion_pytorch_model.safetensors"))
    assert same(model.state_dict(), state_of(4))
    raw = export(step, tmp_path / "raw", "diffusers", ema=False)
    assert same(load_file(raw / "diffusion_pytorch_model.safetensors"), state_of(3))
    with pytest.raises(ConfigError, match="found 'onnx', expected reference or safetensors"):
        export(step, tmp_path / "other", "onnx")
    with pytest.raises(CheckpointError, match="expected a step folder"):
        export(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "part", "seed"),
    [
        ("safetensors", "It holds the averaged weights (EMA; --weights exports the others) in", 4),
        (
            "safetensors",
            "the class is train.model.DiT, which diffusers does not have. Optimizer",
            4,
        ),
        ("safetensors --weights", "It holds the weights that are not averaged", 3),
        ("diffusers", "It holds the averaged weights", 4),  # the name in releases before
        ("reference", "without the optimizer's state", None),
    ],
)
def test_an_export_says_what_it_leaves_out(
    words: str,
    part: str,
    seed: int | None,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    step = import_reference(original, None, tmp_path / "ours")
    out = tmp_path / "out"
    command = ["train", "export", str(step), str(out), "--layout", *words.split()]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(out)
    assert part in second
    assert ("--layout diffusers is called safetensors now" in caplog.text) == (words == "diffusers")
    file = out / "diffusion_pytorch_model.safetensors"
    assert file.exists() == (seed is not None)
    if seed is not None:
        assert same(load_file(file), state_of(seed))


def test_an_export_on_a_full_disk(original: Path, tmp_path: Path) -> None:
    """A limit of a file's size stands in for it: torch says neither the cause nor the path."""
    step = import_reference(original, None, tmp_path / "ours")
    limited = (
        "import resource, sys, train.checkpoints.commands\n"
        "from shards.exits import run\nfrom train.__main__ import main\n"
        "sys.argv = ['train', 'export', *sys.argv[1:], '--layout', 'reference']\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nrun(main)"
    )
    (tmp_path / "exports").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", limited, str(step), str(tmp_path / "exports/out")],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    out = tmp_path / "exports/out"
    assert result.stderr.startswith(f"CheckpointError: {out}: could not be written: [Errno 27]")
    assert STATES in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "exports").iterdir()) == []


def test_one_set_of_weights_of_a_layout_with_both(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = import_reference(original, None, tmp_path / "ours")
    words = ["export", str(step), str(tmp_path / "out"), "--weights"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(
        ConfigError, match="--layout reference, which holds both .* expected safeten"
    ):
        main()
    assert not (tmp_path / "out").exists()


def test_its_columns_may_be_named(columns: Path, original: Path, tmp_path: Path) -> None:
    latents, text = str(columns / "toy/vae"), str(columns / "toy/text")
    manifest = verified(import_reference(original, None, tmp_path / "ours", latents, text))
    assert manifest["data"]["latents"]["identity"]["encoder"] == "toy"
    assert manifest["data"]["latents"]["norm"] == {"shift": [0.1], "scale": [0.8]}
    fields = {**FIELDS, "in_channels": 16}
    wide = write(tmp_path / "wide", 1, {"module": {}, "ema": {}}, fields)
    with pytest.raises(ConfigError, match="found 4 channels, expected 16"):
        import_reference(wide, None, tmp_path / "no", latents, text)


@pytest.mark.parametrize("flag", ["--latents", "--text"])
def test_one_column_without_the_other_is_no_half_of_what_pictures_take(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    words = ["import", str(original), str(tmp_path / "ours"), flag, "a/column"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(ConfigError, match=f"{flag}: found it without --"):
        main()
    assert not (tmp_path / "ours").exists()


def test_imported_weights_sample_as_the_original(tmp_path: Path) -> None:
    tensors, settings = golden("train_loss_flux")
    loop, _ = golden("sample_cfg6_4steps")
    fields = {**settings["dit_config"], "base_config": settings["base_config"]}
    weights = {k[4:]: v for k, v in tensors.items() if k.startswith("dit.")}
    original = write(tmp_path / "original", 10, {"module": weights, "ema": weights}, fields)
    model, _ = load_for_sampling(import_reference(original, 10, tmp_path / "ours"))
    text, mask = loop["text_hidden_states"], loop["attention_mask"]
    empty = text[0, : int(mask[0].sum())]
    captions = [row[real] for row, real in zip(text[2:], mask[2:].bool(), strict=True)]
    result = sample(model, captions, empty, noise=loop["in.latents"], steps=4)
    torch.testing.assert_close(result, loop["out_latents"], atol=1e-5, rtol=0)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_the_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = write(tmp_path / "original", 1, whole(extra=Hostile(mark)))
    file = folder / "1" / STATES
    with pytest.raises(BadReference, match="refused.*more than tensors.*GLOBAL"):
        read(folder)
    file.write_bytes(pickle.dumps(Hostile(mark)))  # as before torch's zip format
    with pytest.raises(BadReference, match=str(file)):
        read(folder)
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # it would have been
    assert mark.exists()


def test_a_file_cut_short_anywhere_is_named(original: Path, tmp_path: Path) -> None:
    whole_file = (original / "100000" / STATES).read_bytes()
    folder = write(tmp_path / "cut", 1, {})
    for length in (0, 1, 100, len(whole_file) // 2, len(whole_file) - 1):
        (folder / "1" / STATES).write_bytes(whole_file[:length])
        with pytest.raises(BadReference, match="found no checkpoint that can be read"):
            read(folder)


def test_flipped_bytes_of_the_pickle_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "flip", 1, {"module": {}, "ema": {}, "global_steps": 7})
    file = folder / "1" / STATES
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    for at in range(len(parts[name])):
        for bit in (0x01, 0x80):
            flipped = bytearray(parts[name])
            flipped[at] ^= bit
            with zipfile.ZipFile(file, "w") as archive:
                for part, content in parts.items():
                    archive.writestr(part, bytes(flipped) if part == name else content)
            with pytest.raises(BadReference):
                read(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"optimizer": {}}, "ema: found NoneType, expected a state dict. It holds optimizer"),
        ({"module": {}}, "module is not of the model"),
        ({"ema": [1, 2]}, "ema: found list"),
        ([1], "found a list, expected module and ema"),
        ({"ema": {"proj_out.bias": torch.zeros(16)}}, "patch_embed.pos_embed: missing"),
        (whole(ema={**state_of(0), "llm.norm": torch.zeros(1)}), "llm.norm: unknown"),
        (
            whole(ema={**state_of(0), "proj_out.bias": torch.zeros(64)}),
            r"proj_out.bias: found \(64,\), expected \(16,\)",
        ),
    ],
    ids=["neither", "no-weights", "no-dict", "no-mapping", "missing", "unknown", "shape"],
)
def test_weights_of_another_model_are_named(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(BadReference, match=f"(?s){named}"):
        read(write(tmp_path / "original", 1, content))


@pytest.mark.parametrize("changes", [{}, {"ema": None}], ids=["absent", "none"])
def test_without_an_average_the_weights_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    content = {name: value for name, value in whole().items() if name != "ema"} | changes
    step = import_reference(write(tmp_path / "original", 10, content), None, tmp_path / "out")
    assert same(load_for_sampling(step)[0].state_dict(), state_of(1))
    assert same(load_for_sampling(step, ema=False)[0].state_dict(), state_of(1))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "found no average (ema); the weights themselves are taken for it"
    ]


def test_what_is_not_there_is_named(tmp_path: Path, original: Path) -> None:
    with pytest.raises(BadReference, match=r"config.json: found nothing"):
        read(tmp_path)
    with pytest.raises(BadReference, match="found steps 50000, 100000, expected step 7"):
        read(original, 7)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(BadReference, match="found none, expected a step folder"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadReference, match="no JSON that can be read"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "attention": "joint"}))
    with pytest.raises(BadReference, match="attention: found 'joint'"):
        read(tmp_path)
