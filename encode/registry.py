"""The encoders known by name, and what a config says of one that is not.

A VAE or text encoder of your own needs no code: give class and path in the YAML. A path is a hub
id, a folder, or `package:NAME/SUB` for data that an installed Python package carries.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from configs import Strict
from shards.storage import Json

from .errors import ModelNotUsable

Precision = Literal["fp32", "bf16-autocast"]


class ModelSpec(Strict):
    """Which weights, held how. fp32 weights under bf16 autocast are what the reference runs."""

    cls: str = Field(alias="class")  # of diffusers (VAEs) or transformers (text)
    path: str
    subfolder: str | None = None
    revision: str | None = None
    precision: Precision = "fp32"

    def identity(self, weights: str) -> Json:
        """The part of a column's identity that says who encoded; `weights` is the digest of the
        loaded weights.
        """
        return {**self.model_dump(by_alias=True), "weights": weights}

    @classmethod
    def of_identity(cls, encoder: Json) -> ModelSpec:
        """The inverse of `identity`, without the digest."""
        return cls.model_validate({k: v for k, v in encoder.items() if k != "weights"})


def _model(cls: str, path: str, subfolder: str | None = None) -> ModelSpec:
    """A model run as the reference runs it."""
    fields = {"class": cls, "path": path, "subfolder": subfolder, "precision": "bf16-autocast"}
    return ModelSpec.model_validate(fields)


KL, QWEN = "AutoencoderKL", "AutoencoderKLQwenImage"
VAES = {
    "flux": _model(KL, "black-forest-labs/FLUX.1-dev", "vae"),
    "flux-e2e": _model(KL, "REPA-E/e2e-flux-vae"),
    "sd35": _model(KL, "stabilityai/stable-diffusion-3.5-large", "vae"),
    "sd35-e2e": _model(KL, "REPA-E/e2e-sd3.5-vae"),
    "qwen": _model(QWEN, "Qwen/Qwen-Image", "vae"),
    "qwen-e2e": _model(QWEN, "REPA-E/e2e-qwenimage-vae"),
}
TEXTS = {"gemma-2b": _model("GemmaModel", "google/gemma-2b")}


def lookup(encoder: str | ModelSpec, known: dict[str, ModelSpec]) -> ModelSpec:
    """A model by its name in the registry; ModelNotUsable lists the names."""
    if isinstance(encoder, ModelSpec):
        return encoder
    if encoder not in known:
        raise ModelNotUsable(
            f"encoder {encoder!r}: no such name; known are {sorted(known)}. Or give class and path"
        )
    return known[encoder]


def location(path: str) -> str:
    """Where a model's files are: a folder's absolute path, or the hub id unchanged."""
    if path.startswith("package:"):
        package, _, rest = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelNotUsable(f"{path}: the Python package {package!r} is not installed")
        path = str(Path(spec.origin).parent / rest)
    folder = Path(path)
    if folder.is_dir():
        return str(folder.resolve())
    if folder.is_absolute() or path.startswith(("./", "../")) or path.count("/") != 1:
        raise ModelNotUsable(f"{path}: no such folder, and no hub id of the form owner/name either")
    return path


def load_model(library: Any, model: ModelSpec, **options: Any) -> Any:
    """Load a frozen model of a library's class in fp32; ModelNotUsable says what is missing.

    Every weight must be in the checkpoint: the libraries would fill up the rest with random
    numbers, and read pickles.
    """
    cls = getattr(library, model.cls, None)
    if cls is None:
        raise ModelNotUsable(f"{model.path}: {library.__name__} has no class {model.cls!r}")
    if model.subfolder:
        options["subfolder"] = model.subfolder
    path = location(model.path)
    try:
        module, report = cls.from_pretrained(
            path, revision=model.revision, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelNotUsable(
            f"{model.path}: cannot be loaded as {model.cls} "
            f"({' '.join(str(error).split())[:200]}). "
            "Check class and path, or that the hub can be reached and its licence is accepted"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelNotUsable(
            f"{model.path}: {len(missing)} weights of {model.cls} are not in it, {missing[:3]} "
            "among them. Check class and path"
        )
    return module.float().eval().requires_grad_(False)


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the sorted names, dtypes, shapes and bytes of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights(found: str, expected: str | None, path: str) -> None:
    """Raise ModelNotUsable if the weights that were loaded are not those a column was made with."""
    if expected is not None and found != expected:
        raise ModelNotUsable(
            f"{path}: weights {found[:16]}... were found, the column was made with "
            f"{expected[:16]}... "
            "Give the path of the original weights, or encode another column"
        )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which an encoder runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-autocast")
