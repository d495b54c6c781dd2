"""The encoders that have a name, and the description of any other in a config.

A VAE or text encoder of your own needs no code: give class and path in the YAML. A path is a hub
id, a folder, or `package:NAME/SUB` for data that an installed Python package carries.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from configs import Strict, did_you_mean, expects, explained
from shards.format import EncoderIdentity
from shards.places import model

from .errors import ModelNotUsable

Precision = Literal["fp32", "bf16-autocast"]
# fields that an identity names only where they are used, as columns from before them do not
LATER = ("tokenizer", "variant", "trust_remote_code")
MEASURED = ("weights", "version", "outputs")  # fields of an identity that a model is checked by
TRUST = "LATENTBANK_TRUST_REMOTE_CODE"  # set to 1: code of models that columns name may run


class ModelSpec(Strict):
    """A model's class and weights, and its precision: the reference runs fp32 weights under bf16
    autocast.
    """

    # of diffusers (VAEs) or transformers (text, features); `package.module:Class` is an autoencoder of
    # your own
    cls: Annotated[
        str,
        Field(pattern=r"^\w+$|^\w+(\.\w+)*:\w+(\.\w+)*$"),
        expects(
            "a class of diffusers or transformers, or package.module:Class of your own. Write it as in AutoencoderKL"
        ),
    ] = Field(alias="class")
    # a hub id, a folder, or `package:NAME/SUB` for data of an installed Python package; what a class of
    # your own is called with
    path: Annotated[str, BeforeValidator(model)] = ""
    subfolder: str | None = None  # of `path`, in which the model is
    revision: str | None = None  # branch, tag or commit of a hub id
    precision: Precision = "fp32"  # of the computation; the weights are fp32
    tokenizer: str | None = None  # its subfolder of `path`, as tokenizer_3 in the SD3.5 repository
    variant: str | None = None  # of the files of weights, as fp16 of `model.fp16.safetensors`
    # run Python code that comes with the model, for classes that no library has (AutoModel); read it
    # first, and fix it by a revision
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.own and not self.path:
            raise ValueError("path is missing: expected a hub id, a folder, or package:NAME/SUB")
        unused = ("subfolder", "revision", "tokenizer", "variant", "trust_remote_code")
        if self.own and (names := [name for name in unused if getattr(self, name)]):
            raise ValueError(
                f"{self.cls} is called with path alone: leave {' and '.join(names)} out, or say it in path"
            )
        return self

    @property
    def own(self) -> bool:
        """Whether the class is one of the user's own, in a Python module."""
        return ":" in self.cls

    def identity(self, weights: str) -> EncoderIdentity:
        """Returns this model in a column's identity; `weights` is the digest of the loaded weights."""
        unused = {name for name in LATER if not getattr(self, name)}
        return EncoderIdentity.of(
            {**self.model_dump(by_alias=True, exclude=unused), "weights": weights}
        )

    @classmethod
    def of_identity(cls, encoder: EncoderIdentity, allow: Collection[str] = ()) -> ModelSpec:
        """Inverts `identity`, without what is measured; ModelNotUsable where it names no model, or one
        with code of its own, or a class of the user's own that `allow` does not name, and the user has
        not allowed that: whoever made a column cannot.
        """
        record = encoder.record()
        fields = {k: v for k, v in record.items() if k not in MEASURED}
        try:
            model = cls.model_validate(fields)
        except ValidationError as error:
            lines = "; ".join(explained(cls, fields, error, defaults=False))
            raise ModelNotUsable(f"a column's encoder {record!r:.200}: {lines}") from None
        if model.trust_remote_code and os.environ.get(TRUST) != "1":
            raise ModelNotUsable(
                f"{model.path}: the column was made by Python code that comes with the model, and "
                f"none is run because a column says so. Read that code; to run it, set {TRUST}=1"
            )
        if model.own and model.cls not in allow:
            raise ModelNotUsable(
                f"{model.cls}: the column was made by a Python class of somebody's own, and none is "
                f"imported because a column says so. Read that class; to run it, say --allow-class "
                f"{model.cls}"
            )
        return model


def _model(cls: str, path: str, subfolder: str | None = None, **fields: str) -> ModelSpec:
    """Returns a model in the precision of the reference."""
    values = {"class": cls, "path": path, "subfolder": subfolder, "precision": "bf16-autocast"}
    return ModelSpec.model_validate(values | fields)


KL, QWEN = "AutoencoderKL", "AutoencoderKLQwenImage"
SD35 = "stabilityai/stable-diffusion-3.5-large"
VAES = {
    "flux": _model(KL, "black-forest-labs/FLUX.1-dev", "vae"),
    "flux-e2e": _model(KL, "REPA-E/e2e-flux-vae"),
    "sd35": _model(KL, SD35, "vae"),
    "sd35-e2e": _model(KL, "REPA-E/e2e-sd3.5-vae"),
    "qwen": _model(QWEN, "Qwen/Qwen-Image", "vae"),
    "qwen-e2e": _model(QWEN, "REPA-E/e2e-qwenimage-vae"),
    "sd-vae": _model(KL, "stabilityai/sd-vae-ft-mse"),
    "sdxl-vae": _model(KL, "madebyollin/sdxl-vae-fp16-fix"),
    "dc-ae-f32c32": _model("AutoencoderDC", "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"),
    "hunyuan-image": _model(
        "AutoencoderKLHunyuanImage", "hunyuanvideo-community/HunyuanImage-2.1-Diffusers", "vae"
    ),
    "va-vae": _model(KL, "REPA-E/vavae-hf"),  # its config has latents_mean and latents_std
}


@dataclass(frozen=True, slots=True)
class PublishedScale:
    """The number by which latents are multiplied, without a shift, and where it was published."""

    scale: float
    source: str


# of encoders whose config has no shift, and sd-vae's no scale either
PUBLISHED = {
    "sd-vae": PublishedScale(
        0.18215,
        "scale_factor of CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml",
    ),
    "sdxl-vae": PublishedScale(
        0.13025, "scale_factor of Stability-AI/generative-models, configs/inference/sd_xl_base.yaml"
    ),
    "dc-ae-f32c32": PublishedScale(
        0.41407, "vae.scale_factor of NVlabs/Sana, configs/sana_config, and the model's config.json"
    ),
    "hunyuan-image": PublishedScale(0.75289, "scaling_factor of the model's vae/config.json"),
}


def published(path: str, subfolder: str | None) -> PublishedScale | None:
    """Returns what was published for a registered autoencoder, by its place; None where its config
    says shift and scale, and for any other.
    """
    places = {(spec.path, spec.subfolder): PUBLISHED.get(name) for name, spec in VAES.items()}
    return places.get((path, subfolder))


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


def lookup(encoder: str | ModelSpec, registry: dict[str, ModelSpec]) -> ModelSpec:
    """Returns a model by its name in a registry; ModelNotUsable lists the names."""
    if isinstance(encoder, ModelSpec):
        return encoder
    if encoder not in registry:
        raise ModelNotUsable(
            f"encoder {encoder!r}: no such name{did_you_mean(encoder, registry)} Known are "
            f"{sorted(registry)}. Or give class and path"
        )
    return registry[encoder]


def location(path: str) -> str:
    """Returns where a model's files are: a folder's absolute path, or the hub id unchanged."""
    if path.startswith("package:"):
        package, _, folder_name = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelNotUsable(f"{path}: the Python package {package!r} is not installed")
        path = str(Path(spec.origin).parent / folder_name)
    folder = Path(path)
    if folder.is_dir():
        return str(folder.resolve())
    if folder.is_absolute() or path.startswith(("./", "../")) or path.count("/") != 1:
        raise ModelNotUsable(f"{path}: no such folder, and no hub id of the form owner/name either")
    return path


def check_weights(weights: str, expected: str | None, path: str) -> None:
    """Raises ModelNotUsable if the digest of loaded weights is not the one of a column."""
    if expected is not None and weights != expected:
        raise ModelNotUsable(
            f"{path}: weights {weights[:16]}... were found, the column was made with "
            f"{expected[:16]}... "
            "Give the path of the original weights, or encode another column"
        )


def one_line(error: Exception) -> str:
    """Returns a library's message, short enough for one of ours."""
    return " ".join(str(error).split())[:200]
