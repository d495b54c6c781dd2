"""The reference's checkpoints: read as they are, made ours, and written again for its tools and for
diffusers.

    <folder>/config.json                            its DiTConfig
    <folder>/<step>/mp_rank_00_model_states.pt      DeepSpeed's pickle: `module` and `ema`, two whole state dicts

The pickle is the one that is ever opened here, by torch's reader of tensors only: code in it is not
run.
"""

from __future__ import annotations

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
from safetensors.torch import load_file
from torch import Tensor

from configs import ConfigError
from shards import atomic_write, open_sources, seal
from shards.format.atomic import fsync_path, naming, read_json

from ..model.config import SHIFT
from ..model.dit import DiT, DiTConfig
from .checkpoint import (
    KIND,
    VERSION,
    WHOLE,
    CheckpointError,
    Manifest,
    provenance,
    verified,
    write_tensors,
)
from .identity import initial_share, training_of, young_average
from .snapshots import load_of_length

STATES = "mp_rank_00_model_states.pt"
ENGINE = {  # without these DeepSpeed does not load a module either
    "dp_world_size": 1, "mp_world_size": 1, "skipped_steps": 0, "global_samples": 0, "optimizer": None,
    "lr_scheduler": None,
}  # fmt: skip
KEYS = {"ema": "ema", "weights": "module"}  # ours -> the key in the pickle
META = {"format": "pt"}  # of a safetensors file, as transformers and diffusers expect
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
    """Returns the model and its (averaged) weights, fp32, which stay in the file until used."""
    config, _ = _config(folder)
    file = _states(folder, tag)
    return config, _state(file, _open(file), "ema" if ema else "weights", config)


def import_reference(
    folder: Path, tag: int | None, out: Path, latents: str | None = None, text: str | None = None
) -> Path:
    """Writes `out/step-<tag>/` with the weights and their average; returns it.

    It is what `init_from` and `load_for_sampling` take, but nothing to resume from: its optimizer's
    state stays behind. The reference does not write down which VAE and text encoder belong to it;
    to make pictures, name the columns that these made."""
    config, fields = _config(folder)
    data = _columns(config, latents, text) if latents and text else None
    file = _states(folder, tag)
    pickled = _open(file)
    states = {kind: _state(file, pickled, kind, config) for kind in WHOLE}
    step = int(file.parent.name)

    def write(staging: Path) -> None:
        files = [write_tensors(staging / WHOLE[k], state, META) for k, state in states.items()]
        manifest = {
            "format": KIND,
            "version": VERSION,
            "source": "reference",
            "step": step,
            "world": 0,
            "model": config.model_dump(mode="json"),
            "reference": fields,
            **({"data": data} if data else {}),
            "files": dict(files),
            "provenance": provenance(),
        }
        atomic_write(staging / "manifest.json", seal(manifest))

    return _publish(out / f"step-{step:08d}", write)


def _columns(config: DiTConfig, latents: str, text: str) -> dict[str, Any]:
    """Returns what a manifest says of columns; ConfigError if they do not fit the model."""
    sources = open_sources(latents, text)
    try:
        sizes = (
            ("channels", sources.latent_shape[0], config.in_channels),
            ("text width", sources.text_width, config.text_width),
        )
        if wrong := [
            f"found {n} {k}, expected {expected}" for k, n, expected in sizes if n != expected
        ]:
            raise ConfigError(
                f"{latents}, {text}: {', '.join(wrong)}. Name the columns of the encoders that the weights were "
                "trained with"
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
    """Returns the pickle of a step, or of the last."""
    files = {int(p.parent.name): p for p in folder.glob(f"*/{STATES}") if p.parent.name.isdigit()}
    if not files or (tag is not None and tag not in files):
        expected = "a step folder" if tag is None else f"step {tag}"
        listed = f"steps {', '.join(map(str, sorted(files)))}" if files else "none"
        raise BadReference(f"{folder}: found {listed}, expected {expected} with {STATES} in it")
    return files[max(files) if tag is None else tag]


def _open(path: Path) -> Mapping[str, Any]:
    """Returns the pickle's content; tensors stay in the file until they are used."""
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UNREADABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if reason := next((line.strip() for line in lines if "GLOBAL" in line), None):
            raise BadReference(
                f"{path}: refused, for it asks for more than tensors and plain values. Nothing in it was run. {reason}"
            ) from None
        raise BadReference(f"{path}: found no checkpoint that can be read: {lines[0]}") from None
    if not isinstance(content, dict):
        raise BadReference(f"{path}: found a {type(content).__name__}, expected module and ema")
    return content


def _state(path: Path, pickled: Mapping[str, Any], kind: str, config: DiTConfig) -> State:
    """Returns one whole state dict, the weights where there is no average; BadReference unless names and
    shapes are the model's.
    """
    key = KEYS[kind]
    if kind == "ema" and pickled.get(key) is None and pickled.get(KEYS["weights"]) is not None:
        log.warning("%s: found no average (%s); the weights themselves are taken for it", path, key)
        key = KEYS["weights"]
    values = pickled.get(key)
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise BadReference(
            f"{path}: {key}: found {type(values).__name__}, expected a state dict. It holds "
            f"{', '.join(map(str, pickled)) or 'nothing'}"
        )
    state = {str(name).replace("_orig_mod.", ""): value for name, value in values.items()}
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


def export(step: Path, out: Path, layout: str = "reference", ema: bool | float = True) -> Path:
    """Writes a step of ours for other tools into the new folder `out`; returns it.

    reference: its own layout, with weights and average. safetensors: one of the two, the average
    unless `ema` is off, or an average of another length, beside the model's config; `diffusers` was
    its name before."""
    layout = "safetensors" if layout == "diffusers" else layout
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: found {layout!r}, expected {' or '.join(LAYOUTS)}")
    if not (step / "manifest.json").is_file():
        raise CheckpointError(
            f"{step}: found no manifest.json, expected a step folder. Name RUN/checkpoints/step-*"
        )
    manifest = verified(step, WHOLE.values())
    if ema is True and (young := young_average(initial_share(manifest), manifest.get("init"))):
        log.warning("%s: %s", step, young)
    if layout == "reference":
        _refuse_other_flow(step, manifest)
    return _publish(out, lambda staging: LAYOUTS[layout](step, manifest, staging, ema))


def _export_reference(step: Path, manifest: Manifest, out: Path, ema: bool | float) -> None:
    config = DiTConfig.model_validate(manifest["model"])
    fields = manifest.get("reference") or config.to_reference()
    if encoder := _text_encoder(manifest):  # from where its tools load the language model
        fields["base_config"].setdefault("_name_or_path", encoder)
    states = {key: load_file(step / WHOLE[kind]) for kind, key in KEYS.items()}
    number = manifest["step"]
    path = out / str(number) / STATES
    path.parent.mkdir()
    _save({**states, **ENGINE, "global_steps": number}, path)
    fsync_path(path)
    atomic_write(out / "config.json", _json(fields))
    atomic_write(out / "latest", str(number).encode())


def _save(values: Mapping[str, Any], path: Path) -> None:
    """Writes a file of `torch.save`; OSError with the path where the disk refuses it, for which torch
    has a RuntimeError with neither.
    """
    with naming(path):
        try:
            with path.open("wb") as file:
                torch.save(dict(values), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _refuse_other_flow(step: Path, manifest: Manifest) -> None:
    """Raises CheckpointError where the model's output is no velocity, which the reference takes it for;
    warns where it has learned other noise levels."""
    flow = training_of(manifest).get("flow") or {}
    if (output := flow.get("prediction", "velocity")) != "velocity":
        raise CheckpointError(
            f"{step}: found a model whose output is the {output}, expected a velocity, for which the reference's tools "
            "would take it. Export it with --layout safetensors"
        )
    if (shift := flow.get("shift", SHIFT)) != SHIFT:
        log.warning(
            "%s: trained at the noise levels of shift %.4g; the reference's tools sample at those of shift %g",
            step, shift, SHIFT,
        )  # fmt: skip


def _export_safetensors(step: Path, manifest: Manifest, out: Path, ema: bool | float) -> None:
    config = DiTConfig.model_validate(manifest["model"])
    if isinstance(ema, bool):
        state = load_file(step / WHOLE["ema" if ema else "weights"])
    else:
        state = load_of_length(step, ema)[0].state_dict()
    write_tensors(out / "diffusion_pytorch_model.safetensors", state, META)
    atomic_write(out / "config.json", _json({"_class_name": "DiT", **config.model_dump()}))


LAYOUTS: dict[str, Callable[[Path, Manifest, Path, bool | float], None]] = {
    "reference": _export_reference,
    "safetensors": _export_safetensors,
}


def _text_encoder(manifest: Manifest) -> str | None:
    """Returns the path of the text encoder's weights, None where the manifest does not name it."""
    try:
        text = manifest["data"]["text"]
        path = (text[0] if isinstance(text, list) else text)["identity"]["encoder"]["path"]
    except (KeyError, TypeError, IndexError):
        return None
    return path if isinstance(path, str) else None


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _publish(final: Path, write: Callable[[Path], None]) -> Path:
    """Lets a folder appear whole under its name, or not at all."""
    if final.exists():
        raise CheckpointError(f"{final}: exists already. Name another folder or remove it")
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
    finally:  # of a folder that did not get its name
        shutil.rmtree(staging, ignore_errors=True)
    return final
