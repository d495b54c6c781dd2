"""What a model is, and how the reference's `config.json` says the same. How it is computed changes
no value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from configs import ConfigError, Strict, explained

TIME_CHANNELS = 256  # sines and cosines of the timestep
Backend = Literal["auto", "plain", "varlen", "flex"]  # see attention.py
SHIFT = 3.0  # the timestep shift of SD3's released scheduler, and of the reference
LEAST_SHIFT, MOST_SHIFT = 0.01, 1000.0  # beyond them fp32 no longer tells the 1,000 levels apart
REFERENCE_PATCH = 2
UNSHIFTED = 4096  # values of a latent whose timestep shift is 1


def shift_of(values: int) -> float:
    """Returns the timestep shift of latents of so many values, sqrt(values / 4096): RAE (arXiv
    2510.11690), where it is at least 1."""
    return math.sqrt(values / UNSHIFTED)


# fields of a flow that earlier releases did not have, and what these did
LATER: dict[str, Any] = {"shift": SHIFT, "prediction": "velocity"}


class FlowConfig(Strict):
    """Which noise levels a training sample is given, what the model says of it, and how its loss is
    weighted; see flow.py."""

    # density of the noise levels, or weight of the loss (sigma_sqrt, cosmap): SD3 (arXiv 2403.03206), section 3.1
    weighting: Literal["logit_normal", "mode", "none", "sigma_sqrt", "cosmap"] = "logit_normal"
    # of logit_normal: mean of the noise level's logit
    logit_mean: float = 0.0
    # of logit_normal: deviation of the noise level's logit
    logit_std: float = Field(default=1.0, gt=0)
    # of mode: its scale; beyond -1 and 1.75 it is no density
    mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    # the loss compares the latent with its estimate, noisy latent - sigma * output; else the velocity with the output
    precondition: bool = False
    # timestep shift: the larger, the more noise the levels have. 3 is SD3's and the reference's; auto: sqrt(values of a
    # latent / 4096), as RAE has it (arXiv 2510.11690)
    shift: Annotated[float, Field(ge=LEAST_SHIFT, le=MOST_SHIFT)] | Literal["auto"] = SHIFT
    # what the model's output is: the velocity, or the latent without noise, whose loss is that of the velocity
    # (noisy latent - latent) / max(sigma, 0.05), as in RAEv2
    prediction: Literal["velocity", "latent"] = "velocity"

    @model_validator(mode="after")
    def _one_estimate(self) -> Self:
        if self.precondition and self.prediction == "latent":
            raise ValueError(
                "found flow.precondition true and flow.prediction latent, expected one of them: with the first the "
                "latent is estimated from a velocity, with the second the model's output is the latent"
            )
        return self

    def resolved(self, values: int) -> Self:
        """Returns the same with the timestep shift as a number, for latents of so many values."""
        return self.model_copy(update={"shift": shift_of(values)}) if self.shift == "auto" else self

    @property
    def timestep_shift(self) -> float:
        """The shift as a number; `resolved` comes before."""
        assert not isinstance(self.shift, str)
        return self.shift

    def identity(self) -> dict[str, Any]:
        """Returns what is compared when a run goes on: without the fields that earlier releases did
        not have, where they say what those did."""
        return {
            key: value
            for key, value in self.model_dump(mode="json").items()
            if key not in LATER or value != LATER[key]
        }


class ComputeConfig(Strict):
    """How the model is run: for speed and memory, the values stay the same but for rounding."""

    # torch.compile, block by block
    compile: bool = False
    # activations of a block are computed again in the backward pass (arXiv 1604.06174)
    recompute: bool = False
    # kernel of the attention; auto: what the device can
    attention: Backend = "auto"


def table_side(tokens: int) -> int:
    """Returns the side of the table of positions, in tokens, for latents of so many tokens a side.
    At 256 px it is the reference's."""
    return max(tokens, min(4 * tokens, 64))


class Architecture(Strict):
    """What a person chooses of a model, and its config.json says."""

    # width of a token between the blocks
    hidden_size: int = Field(ge=1)
    # blocks, one after the other
    layers: int = Field(ge=1)
    # queries of the attention
    heads: int = Field(ge=1)
    # keys and values of the attention, each for heads / kv_heads queries
    kv_heads: int = Field(ge=1)
    # width of a head
    head_dim: int = Field(ge=1)
    # width inside a block's gated MLP
    mlp_size: int = Field(ge=1)
    # side of the square of latent places that is a token; auto: the largest that divides both sides of the latent and
    # leaves `image_tokens`, else 1
    patch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = REFERENCE_PATCH
    # self: text and picture in one sequence; cross: the picture attends to the text
    attention: Literal["self", "cross"] = "self"
    # positions: a table of sines and cosines that is added (ape), or rotations of queries and keys
    pos_embed: Literal["ape", "1d-rope", "2d-rope", "m-rope"] = "ape"
    # side of the sincos table, in tokens; null: four times that of a latent, for larger pictures later, but 64 at most
    # unless a latent has more
    pos_embed_max_size: int | None = Field(default=None, ge=1)
    # latent side whose token grid gets the coordinates 0 .. sample_size / patch_size; null: the column's. Where
    # patch_size is auto it is counted in patches of 2, so that N x N tokens have the same coordinates for every latent
    sample_size: int | None = Field(default=None, ge=1)
    # how the blocks learn the noise level: modulated by each block (DiT, arXiv 2212.09748), by one table for all
    # (PixArt-alpha, arXiv 2310.00426), by a term that is added to the tokens, or not at all
    timestep_conditioning: Literal["adaln-zero", "adaln-single", "addition", "none"] = "adaln-zero"
    # RMS norm of queries and keys
    qk_norm: bool = True
    # a norm behind attention and MLP, too
    sandwich_norm: bool = False
    # biases of the attention's matrices
    attention_bias: bool = False
    # of the gated MLP
    activation: Literal["gelu_pytorch_tanh", "gelu", "silu"] = "gelu_pytorch_tanh"
    # added to the mean square in each norm
    norm_eps: float = Field(default=1e-6, ge=0, le=1)
    # base of the rotations' frequencies
    rope_theta: float = Field(default=10_000.0, gt=0)
    # deviation of the initial weights of matrices
    initializer_range: float = Field(default=0.02, ge=0, le=100)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}: each key head serves as many queries"
            )
        if self.pos_embed == "ape" and self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 4: sines and cosines of row and column share it"
            )
        side = self.sample_size
        patch = REFERENCE_PATCH if self.patch_size == "auto" else self.patch_size
        if self.pos_embed == "ape" and side is not None and side < patch:
            raise ValueError(
                f"sample_size {side} is less than patch_size {patch}: no token has a place there"
            )
        parts = {"ape": 1, "1d-rope": 2}.get(self.pos_embed, 4)
        if self.head_dim % parts:
            raise ValueError(
                f"head_dim {self.head_dim} is no multiple of {parts}, into which {self.pos_embed} cuts it"
            )
        return self


class ModelConfig(Architecture):
    """What a config says. Channels and text width are not here: they come from the columns."""

    # where patch_size is auto, of a picture: at least as many, if patches of 1 make as many
    image_tokens: int = Field(default=256, ge=1)


class DiTConfig(Architecture):
    """A model in full: what was chosen, and what its columns say."""

    patch_size: int = Field(default=REFERENCE_PATCH, ge=1)
    # the reference's, where its config.json leaves them out
    pos_embed_max_size: int = Field(default=64, ge=1)
    sample_size: int = Field(default=32, ge=1)
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    text_width: int = Field(ge=1)
    # of weights that the reference makes and never uses
    text_modulation_width: int | None = Field(default=None, ge=1)

    @classmethod
    def from_reference(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the reference's `config.json`, its Gemma-like `base_config` nested in it;
        ConfigError if it is none.

        A field that is absent or null has the default of the class that wrote it; unknown ones are
        ignored."""
        if fields.get("model_type", "DiT") != "DiT":
            raise ConfigError(
                f"config.json: model_type: found {fields['model_type']!r}, expected 'DiT'. Deep fusion (FuseDiT), "
                "where a language model runs in the step, is not supported"
            )
        base = _base(fields.get("base_config"))
        top = REFERENCE | {name: value for name, value in fields.items() if value is not None}
        if fields.get("timestep_conditioning", "") is None:
            top["timestep_conditioning"] = "none"
        width = top.get("dit_hidden_size") or _need(base, "hidden_size")
        heads, *_ = (
            _need(base, name)
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )
        values = {field: top.get(name) for field, name in TOP_NAMES.items()}
        values |= {field: base.get(name) for field, name in BASE_NAMES.items()}
        values["hidden_size"] = width
        values["head_dim"] = base.get("head_dim") or base.get("hidden_size", width) // heads
        values["text_width"] = top.get("text_hidden_size") or _need(base, "hidden_size")
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            names = TOP_NAMES | {k: f"base_config.{name}" for k, name in BASE_NAMES.items()}
            faults = (
                line.partition(": ") for line in explained(cls, values, error, defaults=False)
            )
            lines = [f"{names.get(key, key)}{colon}{rest}" for key, colon, rest in faults]
            raise ConfigError("\n  ".join(["config.json is of no model here:", *lines])) from None

    def to_reference(self) -> dict[str, Any]:
        """Returns the `config.json` from which `from_reference` makes this model again."""
        values = self.model_dump()
        top = {name: values[field] for field, name in TOP_NAMES.items()}
        base = {name: values[field] for field, name in BASE_NAMES.items()}
        if top["timestep_conditioning"] == "none":
            top["timestep_conditioning"] = None
        base |= {"model_type": "gemma", "hidden_size": self.hidden_size}
        return {"architectures": ["DiT"], "model_type": "DiT", **top, "base_config": base}


# field -> its name in the reference's config.json
SAME = (
    *("attention", "in_channels", "out_channels", "patch_size", "pos_embed", "pos_embed_max_size"),
    *("qk_norm", "sample_size", "sandwich_norm", "timestep_conditioning"),
)
TOP_NAMES = {
    **{name: name for name in SAME},
    "hidden_size": "dit_hidden_size",
    "layers": "dit_num_hidden_layers",
    "text_width": "text_hidden_size",
    "text_modulation_width": "text_modulation_embeds_dim",
}
BASE_NAMES = {  # in its base_config
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_size": "intermediate_size",
    "activation": "hidden_activation",
    "norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "rope_theta": "rope_theta",
    "initializer_range": "initializer_range",
}
# What the reference's class fills in for a field that a config.json leaves out, where it differs from ours.
REFERENCE: dict[str, Any] = {
    "dit_num_hidden_layers": 18,
    "pos_embed": "1d-rope",
    "qk_norm": False,
    "in_channels": 16,
    "out_channels": 16,
}
# What transformers' classes fill in for a field that a config.json leaves out.
ANY_BASE: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",  # also where it is null; `hidden_act` is ignored
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_theta": 10_000.0,
    "initializer_range": 0.02,
}
BASES: dict[str | None, dict[str, Any]] = {
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256,
    },
    "gemma2": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    },
}  # fmt: skip


def _base(config: Any) -> dict[str, Any]:
    """Returns the nested config with its class's defaults; a null `head_dim` stays."""
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config.json: base_config: found {type(config).__name__}, expected the config of the language model whose "
            "geometry the model has"
        )
    defaults = {**ANY_BASE, **BASES.get(config.get("model_type"), {})}
    rope = config.get("rope_parameters")  # where transformers 5 keeps it
    if isinstance(rope, Mapping) and rope.get("rope_theta") is not None:
        defaults["rope_theta"] = rope["rope_theta"]
    return defaults | {k: v for k, v in config.items() if v is not None or k == "head_dim"}


def _need(base: Mapping[str, Any], name: str) -> int:
    if not isinstance(value := base.get(name), int) or value < 1:
        raise ConfigError(
            f"config.json: base_config.{name}: found {value!r}, expected a number. model_type "
            f"{base.get('model_type')!r} has no default for it; {' and '.join(map(str, BASES))} have"
        )
    return value
