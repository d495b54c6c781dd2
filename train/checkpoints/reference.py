"""The reference's checkpoints: read as they are, made ours, and written again for its tools and for diffusers.

    <folder>/config.json                            its DiTConfig
    <folder>/<step>/mp_rank_00_model_states.pt      DeepSpeed's pickle: `module` and `ema`, two whole state dicts

The pickle is the one that is ever opened here, by torch's reader of tensors only: code in it is not run.
"""

import json
import logging
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import ConfigError
from shards import atomic_write, open_sources, seal, sha256_file
from shards.format.atomic import fsync_path, make_readable, read_json

from ..model.dit import DiT, DiTConfig
from .checkpoint import KIND, VERSION, WHOLE, CheckpointError, Manifest, provenance, verified
from .identity import initial_share, young_average

STATES = "mp_rank_00_model_states.pt"
ENGINE = {  # without these DeepSpeed does not load a module either
    "dp_world_size": 1, "mp_world_size": 1, "skipped_steps": 0, "global_samples": 0, "optimizer": None,
    "lr_scheduler": None,
}  # fmt: skip
KEYS = {"ema": "ema", "weights": "module"}  # ours -> the key in the pickle
State = dict[str, Tensor]
log = logging.getLogger(__name__)
UNREADABLE = (  # what torch's reader raises on a file that is hostile, cut short, or never was a checkpoint
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip


class BadReference(CheckpointError):
    """A folder that is no checkpoint of the reference, or one that its config.json does not fit."""


# Reading -------------------------------------------------------------------------------------------------------------


def read(folder: Path, tag: int | None = None, ema: bool = True) -> tuple[DiTConfig, State]:
    """The model and its (averaged) weights, fp32, which stay in the file until they are used."""
    config, _ = _config(folder)
    file = _states(folder, tag)
    return config, _state(file, _open(file), "ema" if ema else "weights", config)


def import_reference(
    folder: Path, tag: int | None, out: Path, latents: str | None = None, text: str | None = None
) -> Path:
    """Write `out/step-<tag>/` with the weights and their average; returns it.

    It is what `init_from` and `load_for_sampling` take, but nothing to resume from: its optimizer's state stays
    behind. The reference does not write down which VAE and text encoder belong to it; to make pictures, name the
    columns that these made."""
    config, fields = _config(folder)
    data = _columns(config, latents, text) if latents and text else None
    file = _states(folder, tag)
    pickled = _open(file)
    states = {kind: _state(file, pickled, kind, config) for kind in WHOLE}
    step = int(file.parent.name)

    def write(staging: Path) -> None:
        files = [_write(staging / WHOLE[kind], state) for kind, state in states.items()]
        manifest = {
            "format": KIND,
            "version": VERSION,
            "source": "reference",
            "step": step,
            "world": 0,
            "model": config.model_dump(mode="json"),
            "reference": fields,
            **({"data": data} if data else {}),
            "files": {name: {"bytes": size, "sha256": digest} for name, size, digest in files},
            "provenance": provenance(),
        }
        atomic_write(staging / "manifest.json", seal(manifest))

    return _publish(out / f"step-{step:08d}", write)


def _columns(config: DiTConfig, latents: str, text: str) -> dict[str, Any]:
    """What a run's manifest says of its columns; ConfigError if they are not of the model's shape."""
    sources = open_sources(latents, text)
    try:
        found = {"channels": sources.latent_shape[0], "text width": sources.text_width}
        expected = {"channels": config.in_channels, "text width": config.text_width}
        if wrong := [k for k in found if found[k] != expected[k]]:
            raise ConfigError(
                f"{latents}, {text}: "
                + ", ".join(f"found {found[k]} {k}, expected {expected[k]}" for k in wrong)
                + ". Name the columns of the encoders that the weights were trained with"
            )
        return sources.identity()
    finally:
        sources.close()


def _config(folder: Path) -> tuple[DiTConfig, dict[str, Any]]:
    path = folder / "config.json"
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise BadReference(
            f"{path}: found nothing, expected the model's config. Name the folder that holds it and the step folders"
        ) from None
    except (OSError, ValueError) as error:
        raise BadReference(f"{path}: found no JSON that can be read: {error}") from None
    if not isinstance(fields, dict):
        raise BadReference(f"{path}: found a {type(fields).__name__}, expected an object")
    try:
        return DiTConfig.from_reference(fields), fields
    except ConfigError as error:
        raise BadReference(f"{folder}: {error}") from None


def _states(folder: Path, tag: int | None) -> Path:
    """The pickle of a step, or of the last."""
    found = sorted(
        int(p.parent.name) for p in folder.glob(f"*/{STATES}") if p.parent.name.isdigit()
    )
    names = {int(p.name): p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()}
    if not found or (tag is not None and tag not in found):
        wanted = "a step folder" if tag is None else f"step {tag}"
        listed = f"steps {', '.join(map(str, found))}" if found else "none"
        raise BadReference(f"{folder}: found {listed}, expected {wanted} with {STATES} in it")
    return names[found[-1] if tag is None else tag] / STATES


def _open(path: Path) -> Mapping[str, Any]:
    """The pickle's content; tensors stay in the file until they are used."""
    try:
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UNREADABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if named := next((line.strip() for line in lines if "GLOBAL" in line), None):
            raise BadReference(
                f"{path}: refused, for it asks for more than tensors and plain values. Nothing in it was run. {named}"
            ) from None
        raise BadReference(f"{path}: found no checkpoint that can be read: {lines[0]}") from None
    if not isinstance(found, dict):
        raise BadReference(f"{path}: found a {type(found).__name__}, expected module and ema")
    return found


def _state(path: Path, pickled: Mapping[str, Any], kind: str, config: DiTConfig) -> State:
    """One whole state dict, its names and shapes those of the config's model."""
    key = KEYS[kind]
    found = pickled.get(key)
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BadReference(
            f"{path}: {key}: found {type(found).__name__}, expected a state dict. It holds "
            f"{', '.join(map(str, pickled)) or 'nothing'}"
        )
    state = {str(name).replace("_orig_mod.", ""): value for name, value in found.items()}
    with torch.device("meta"):
        model = DiT(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [f"{name}: missing" for name in expected if name not in state]
    wrong += [f"{name}: unknown" for name in state if name not in expected]
    wrong += [
        f"{name}: found {tuple(state[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if wrong:
        more = [f"... and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise BadReference(
            "\n  ".join([f"{path}: {key} is not of the model in config.json:", *wrong[:8], *more])
        )
    return {name: value.detach().float() for name, value in state.items()}


# Writing -------------------------------------------------------------------------------------------------------------


def export(step: Path, out: Path, layout: str = "reference", ema: bool = True) -> Path:
    """Write a step of ours for other tools into the new folder `out`; returns it.

    reference: its own layout, with weights and average. diffusers: one of the two, the average unless `ema` is off."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: found {layout!r}, expected {' or '.join(LAYOUTS)}")
    if not (step / "manifest.json").is_file():
        raise CheckpointError(
            f"{step}: found no manifest.json, expected a step folder. Name RUN/checkpoints/step-*"
        )
    manifest = verified(step, WHOLE.values())
    if ema and (young := young_average(initial_share(manifest), manifest.get("init"))):
        log.warning("%s: %s", step, young)
    return _publish(out, lambda staging: LAYOUTS[layout](step, manifest, staging, ema))


def _export_reference(step: Path, manifest: Manifest, out: Path, ema: bool) -> None:
    config = DiTConfig.model_validate(manifest["model"])
    fields = manifest.get("reference") or config.to_reference()
    if encoder := _text_encoder(manifest):  # from where its tools load the language model
        fields["base_config"].setdefault("_name_or_path", encoder)
    states = {theirs: load_file(step / WHOLE[ours]) for ours, theirs in KEYS.items()}
    number = manifest["step"]
    folder = out / str(number)
    folder.mkdir()
    torch.save({**states, **ENGINE, "global_steps": number}, folder / STATES)
    fsync_path(folder / STATES)
    atomic_write(out / "config.json", _json(fields))
    atomic_write(out / "latest", str(number).encode())


def _export_diffusers(step: Path, manifest: Manifest, out: Path, ema: bool) -> None:
    config = DiTConfig.model_validate(manifest["model"])
    _write(
        out / "diffusion_pytorch_model.safetensors",
        load_file(step / WHOLE["ema" if ema else "weights"]),
    )
    atomic_write(out / "config.json", _json({"_class_name": "DiT", **config.model_dump()}))


LAYOUTS: dict[str, Callable[[Path, Manifest, Path, bool], None]] = {
    "reference": _export_reference,
    "diffusers": _export_diffusers,
}


def _text_encoder(manifest: Manifest) -> str | None:
    text = manifest.get("data", {}).get("text")
    text = text[0] if isinstance(text, list) and text else text
    found = text.get("identity", {}).get("encoder") if isinstance(text, dict) else None
    path = found.get("path") if isinstance(found, dict) else None
    return path if isinstance(path, str) else None


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _write(path: Path, state: Mapping[str, Tensor]) -> tuple[str, int, str]:
    """(name, bytes, sha256) of a safetensors file."""
    save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt"})
    make_readable(path)
    fsync_path(path)
    return path.name, path.stat().st_size, sha256_file(path)


def _publish(final: Path, write: Callable[[Path], None]) -> Path:
    """Let a folder appear whole under its name, or not at all."""
    if final.exists():
        raise CheckpointError(f"{final}: stands there already. Name another folder or remove it")
    staging = final.with_name(f".staging-{final.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a crash left
        staging.mkdir(parents=True)
        write(staging)
        fsync_path(staging)
        staging.rename(final)
        fsync_path(final.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: could not be written: {error}") from None
    return final
