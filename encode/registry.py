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

    cls: str = Field(alias="class")  # of diffusers (VAEs) or transformers (text, features)
    path: str
    subfolder: str | None = None
    revision: str | None = None
    precision: Precision = "fp32"
    tokenizer: str | None = None  # its subfolder of `path`, as tokenizer_3 in the SD3.5 repository

    def identity(self, weights: str) -> Json:
        """The part of a column's identity that says who encoded; `weights` is the digest of the
        loaded weights.
        """
        unused = set() if self.tokenizer else {"tokenizer"}
        return {**self.model_dump(by_alias=True, exclude=unused), "weights": weights}

    @classmethod
    def of_identity(cls, encoder: Json) -> ModelSpec:
        """The inverse of `identity`, without the digest."""
        return cls.model_validate({k: v for k, v in encoder.items() if k != "weights"})


def _model(cls: str, path: str, subfolder: str | None = None, **fields: str) -> ModelSpec:
    """A model run as the reference runs it."""
    given = {"class": cls, "path": path, "subfolder": subfolder, "precision": "bf16-autocast"}
    return ModelSpec.model_validate(given | fields)


KL, QWEN = "AutoencoderKL", "AutoencoderKLQwenImage"
SD35 = "stabilityai/stable-diffusion-3.5-large"
VAES = {
    "flux": _model(KL, "black-forest-labs/FLUX.1-dev", "vae"),
    "flux-e2e": _model(KL, "REPA-E/e2e-flux-vae"),
    "sd35": _model(KL, SD35, "vae"),
    "sd35-e2e": _model(KL, "REPA-E/e2e-sd3.5-vae"),
    "qwen": _model(QWEN, "Qwen/Qwen-Image", "vae"),
    "qwen-e2e": _model(QWEN, "REPA-E/e2e-qwenimage-vae"),
}
TEXTS = {
    "gemma-2b": _model("GemmaModel", "google/gemma-2b"),
    "gemma-2-2b": _model("Gemma2Model", "google/gemma-2-2b"),
    "t5-xxl": _model("T5EncoderModel", SD35, "text_encoder_3", tokenizer="tokenizer_3"),
    "clip-l": _model("CLIPTextModel", "openai/clip-vit-large-patch14"),
    "qwen3-1.7b": _model("Qwen3Model", "Qwen/Qwen3-1.7B"),
}
FEATURES = {
    "dinov2-b": _model("Dinov2Model", "facebook/dinov2-base"),
    "siglip-so400m": _model("SiglipVisionModel", "google/siglip-so400m-patch14-384"),
}


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
    path, talk = location(model.path), library.utils.logging
    talks = talk.get_verbosity()
    talk.set_verbosity_error()  # both list at length what a checkpoint holds beyond this class
    try:
        module, report = cls.from_pretrained(
            path, revision=model.revision, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ModelNotUsable(
            f"{model.path}: cannot be loaded as {model.cls} "
            f"({one_line(error)}). "
            "Check class and path, or that the hub can be reached and its licence is accepted"
        ) from error
    finally:
        talk.set_verbosity(talks)
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


def one_line(error: Exception) -> str:
    """What a library says, short enough to stand in a message."""
    return " ".join(str(error).split())[:200]


def tune(module: torch.nn.Module, hot: torch.nn.Module, compiled: bool, last: bool) -> None:
    """Make a model faster on a GPU: compile its hot part, lay convolutions out channels last. In
    place, and after the digest: neither names nor values change, only the last bits of results.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters() if last else ():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    if compiled:
        hot.compile()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which an encoder runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-autocast")
