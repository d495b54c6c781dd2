"""Autoencoders of the user's own: a Python class that a config names as `package.module:Class`.

Such a class runs code, so it is imported where a config or a flag names it, never because a column
does (`ModelSpec.of_identity`). What it is, the identity of its columns says by its name, the `version`
that it states, the digest of its weights, and what it makes of two fixed pictures. The digest of its
source file is recorded in commits, but not compared: a comment may change.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Norm
from shards.format import EncoderIdentity
from shards.format.atomic import Json, canonical_json

from ..config import LatentsColumn, MomentsColumn
from ..errors import EncodeError, ModelNotUsable
from ..registry import ModelSpec, check_weights, location, one_line
from ..source.decoding import View
from .vae import YAML_NORM, Vae
from .weights import autocast, tensors_digest

RANGE = (-1.0, 1.0)  # of pixels, where the class says no other
MOST = 4_096  # pixels of a side that a column's outputs may ask for
PLACES = 6  # of a row whose values are compared
DIGITS = 3  # significant ones of what is compared
# by which values may differ on another machine, over the root mean square of a row: kernels of a GPU,
# and the rounding to DIGITS; as for a batch in `rehearsal`
TOLERANCE = {"fp32": 0.02, "bf16-autocast": 0.13}


class Autoencoder(Protocol):
    """What a class must have. It is called with the model's path, or with nothing where the config has
    none; `package.module:Class.method` names another function that returns an instance.

    Optional attributes: `pixel_range` (low, high) of the pixels that it takes and gives, (-1, 1)
    without it; `posterior`: True where `encode` returns mean and log-variance; `norm`: (shift, scale),
    numbers or arrays that broadcast to latents (C, H, W), for z = (latent - shift) * scale. A
    `torch.nn.Module` is put on the device, and its `state_dict` is its weights; of any other object,
    its attributes that are modules or tensors.
    """

    version: str  # another one is another column

    def encode(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Maps fp32 pixels (B, 3, H, W) to latents (B, C, h, w), or (B, N, C) without places. With a
        posterior: (mean, logvar), each of such a shape, or both of them along the channels.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Maps fp32 latents, in the shape that `encode` gives, to pixels (B, 3, H, W)."""


class OwnVae(Vae):
    """A user's class behind the interface of `Vae`. Tokens (N, C) are stored as latents (C, 1, N)."""

    def __init__(
        self, model: ModelSpec, device: str = "cpu", expected: str | None = None, *,
        config: MomentsColumn | LatentsColumn | None = None, resolution: int | None = None,
    ) -> None:  # fmt: skip
        """Imports the class and makes an instance; ModelNotUsable if that fails, if `expected` is the
        `signature` of another one, or if it cannot fill the column of `config`. Fixed pictures have the
        side of `config`, of `expected` or `resolution`.
        """
        self.model, self.device = model, torch.device(device)
        self._column_norm, self._lock = None, threading.Lock()
        self._object = instance(model)
        self._parts = torch_parts(self._object)
        self.weights = tensors_digest(self._state())
        for name, part in self._parts.items():
            moved = part.to(self.device)
            if isinstance(moved, torch.nn.Module):
                moved.eval().requires_grad_(False)
            elif moved is not part:
                setattr(self._object, name, moved)
        self.kind = "moments" if self._attribute("posterior", False) is True else "latents"
        self._low, self._high = self._range()
        known: Json = json.loads(expected) if expected else {}
        self._refuse_other(known)
        if config is not None:
            if config.kind != self.kind:
                raise self._other_kind(config.kind)
            self.config, self._column_norm = config, config.norm
            self.view = View(config.resolution, config.suffix)
            resolution = config.resolution
            _ = self.norm
        outputs = known.get("outputs")
        self.outputs = self._outputs(_side(outputs) or resolution)
        if outputs is not None and not self._close(outputs):
            raise ModelNotUsable(
                f"{self.cls}: of two fixed pictures it makes other values than when the column was made, "
                f"though version and weights are the same: {(self.outputs or {}).get('figures')!r:.120}, "
                f"then {outputs!r:.120}. Bring back the code that made the column, or encode another one "
                "under another version"
            )

    # What it says of itself -----------------------------------------------------------------------

    @property
    def cls(self) -> str:
        return self.model.cls

    @property
    def _known(self) -> bool:
        return True

    @property
    def version(self) -> str:
        version = self._attribute("version", None)
        if not isinstance(version, str) or not version:
            raise ModelNotUsable(
                f"{self.cls}: found version {version!r:.80}, expected a text such as '1'. State it in the "
                "class, and another one whenever what it computes changes"
            )
        return version

    def _attribute(self, name: str, default: Any) -> Any:
        value = getattr(self._object, name, default)
        # layers have such names, too: a LayerNorm is no normalisation of latents
        return default if isinstance(value, torch.nn.Module) or callable(value) else value

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            values = part.state_dict() if isinstance(part, torch.nn.Module) else {"": part}
            prefix = f"{name}." if name else ""
            state |= {f"{prefix}{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        return state

    def _range(self) -> tuple[float, float]:
        values = self._attribute("pixel_range", RANGE)
        try:
            low, high = map(float, values)
            sound = -1e6 < low < high < 1e6
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ModelNotUsable(
                f"{self.cls}: found pixel_range {values!r:.80}, expected two numbers, the lower first, "
                "such as (0, 1)"
            )
        return low, high

    @cached_property
    def norm(self) -> Norm:
        """The normalisation that the class states, or the column's, which must not contradict it."""
        stated, column = self._attribute("norm", None), self._column_norm
        own = None if stated is None else self._norm_of(stated)
        if own is None and column is None:
            raise ModelNotUsable(
                f"{self.cls}: the class has no norm, and the column neither. Training needs one: give "
                "the class norm = (shift, scale), or say in the column norm: {shift: [0.0], scale: "
                "[1.0]} (these where latents are normalised already)"
            )
        if own is not None and column is not None and own != column.norm:
            raise ModelNotUsable(
                f"{self.cls}: the class normalises by {own.summary()}, the column by "
                f"{column.norm.summary()}. Leave norm out of the column"
            )
        return own or column.norm  # type: ignore[union-attr]  # one of them is there

    @property
    def norm_source(self) -> str:
        return YAML_NORM if self._attribute("norm", None) is None else "norm of the class"

    def _norm_of(self, stated: Any) -> Norm:
        try:
            pair = (stated["shift"], stated["scale"]) if isinstance(stated, Mapping) else stated
            shift, scale = map(_array, pair)
            return Norm(shift, scale)  # type: ignore[arg-type]  # it takes arrays, and keeps tuples
        except (TypeError, ValueError, KeyError) as error:
            raise ModelNotUsable(
                f"{self.cls}: its norm is no pair of shift and scale ({one_line(error)}). Give "
                "numbers, or arrays that broadcast to latents (C, H, W)"
            ) from None

    # Identity -------------------------------------------------------------------------------------

    @property
    def signature(self) -> str:
        known = {"weights": self.weights, "version": self.version, "outputs": self.outputs}
        return canonical_json(known).decode()

    def identified(self) -> EncoderIdentity:
        identity = self.model.identity(self.weights).record()
        return EncoderIdentity.of(identity | {"version": self.version, "outputs": self.outputs})

    def with_outputs_of(self, existing: Json) -> Json:
        outputs = existing.get("outputs")
        return {"outputs": outputs} if self._close(outputs) else {}

    def _outputs(self, resolution: int | None) -> Json | None:
        """Returns what the class makes of two fixed pictures: of each row, as a column stores it, mean,
        deviation and values at PLACES, to DIGITS. Not a digest: that of rounded numbers differs between
        machines wherever a number is near the boundary of rounding.
        """
        if resolution is None:
            return None
        _ = self.moments_shape(resolution)
        rows = self.rows(fixed_pictures(resolution)).astype(np.float64)
        if not np.isfinite(rows).all():
            raise ModelNotUsable(
                f"{self.cls}: gives values of fixed pictures that are no finite float16 numbers: columns "
                "hold float16. Divide by a constant in the class"
            )
        figures = []
        for row in rows.reshape(len(rows), -1):
            places = np.linspace(0, len(row) - 1, PLACES).astype(int)
            figures.append(
                [float(f"{v:.{DIGITS}g}") for v in (row.mean(), row.std(), *row[places])]
            )
        return {"resolution": resolution, "figures": figures}

    def _close(self, outputs: Any) -> bool:
        """Returns whether outputs that are recorded are these, but for rounding."""
        if self.outputs is None or not isinstance(outputs, dict):
            return False
        try:
            a, b = (np.array(o["figures"], np.float64) for o in (self.outputs, outputs))
        except (KeyError, TypeError, ValueError):
            return False
        if self.outputs["resolution"] != outputs.get("resolution") or a.shape != b.shape:
            return False
        size = np.hypot(b[:, 0], b[:, 1])[:, None]
        return bool((np.abs(a - b) <= TOLERANCE[self.model.precision] * size).all())

    def _refuse_other(self, known: Json) -> None:
        """Raises ModelNotUsable if weights or version are not those of `known`, a signature."""
        check_weights(self.weights, known.get("weights"), self.model.path or self.cls)
        if known and known.get("version") != self.version:
            raise ModelNotUsable(
                f"{self.cls}: found version {self.version!r}, the column was made with "
                f"{known.get('version')!r}. Install that version, or encode another column"
            )

    def runs_on(self) -> Json:
        return {**super().runs_on(), "class_source": source_digest(self._object)}

    # Pixels and latents ---------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.device, torch.float32)
        x = (x + 1) / 2 * (self._high - self._low) + self._low
        with self._lock, autocast(self.model.precision, self.device):
            output = self._object.encode(x)
        parts = list(output) if isinstance(output, tuple) else [output]
        if not all(isinstance(part, Tensor) and part.ndim in (3, 4) for part in parts):
            raise self._wrong(
                "encode", output, "a tensor (B, C, h, w) or (B, N, C), or (mean, logvar)"
            )
        if len(parts) != (2 if self.kind == "moments" and isinstance(output, tuple) else 1):
            raise self._wrong(
                "encode", output, "one tensor. Say posterior = True where it gives mean and logvar"
            )
        parts = [part.float() for part in parts]
        self._tokens = parts[0].ndim == 3
        if self._tokens:
            parts = [part.transpose(1, 2).unsqueeze(2) for part in parts]
        rows = torch.cat(parts, 1)
        if len(rows) != len(pixels) or (self.kind == "moments" and rows.shape[1] % 2):
            raise self._wrong(
                "encode", output, f"{len(pixels)} rows, of mean and logvar as many channels"
            )
        if self.kind == "moments":
            mean, logvar = rows.chunk(2, 1)
            rows = torch.cat([mean, logvar.clamp(-30, 20)], 1)
        return rows

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, torch.float32)
        if self._tokens:
            z = z.squeeze(2).transpose(1, 2)
        with self._lock, autocast(self.model.precision, self.device):
            pixels = self._object.decode(z)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise self._wrong("decode", pixels, "pixels (B, 3, H, W)")
        x = (pixels.float() - self._low) / (self._high - self._low)
        return (2 * x - 1).clamp(-1, 1)

    _tokens = False  # rows have no places; known once something was encoded

    def _wrong(self, method: str, output: Any, expected: str) -> ModelNotUsable:
        parts = output if isinstance(output, tuple) else (output,)
        shown = [
            f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            for part in parts
        ]
        return ModelNotUsable(
            f"{self.cls}: {method} gives {' and '.join(shown)}, expected {expected}"
        )

    def _other_kind(self, kind: str) -> ModelNotUsable:
        return ModelNotUsable(
            f"{self.cls}: the class says posterior = {self.kind == 'moments'}. Say kind: {self.kind}, not "
            f"{kind}"
        )

    def _refuse_channels(self) -> None: ...


def _side(outputs: Any) -> int | None:
    """Returns the side of the pictures that recorded outputs are of."""
    side = outputs.get("resolution") if isinstance(outputs, dict) else None
    return side if isinstance(side, int) and 0 < side <= MOST else None


# The class and its weights -----------------------------------------------------------------------


def instance(model: ModelSpec) -> Any:
    """Returns an instance of a model's class; ModelNotUsable if it cannot be imported or made, or lacks
    a method.
    """
    module, _, names = model.cls.partition(":")
    advice = (
        "Name it as package.module:Class; its package must be installed, or its folder on PYTHONPATH, "
        "on every machine that encodes or decodes"
    )
    with _theirs(f"{model.cls}: cannot be imported", advice):
        make: Any = importlib.import_module(module)
        for name in names.split("."):
            make = getattr(make, name)
    with _theirs(f"{model.cls}: cannot be made of path {model.path!r}", "Check path and class"):
        made = make(_path(model.path)) if model.path else make()
    absent = [name for name in ("encode", "decode") if not callable(getattr(made, name, None))]
    if absent:
        raise ModelNotUsable(
            f"{model.cls}: it has no {' and no '.join(absent)}. Expected encode(pixels) and "
            "decode(latents)"
        )
    return made


@contextmanager
def _theirs(failure: str, advice: str) -> Iterator[None]:
    """Turns whatever code of the user's raises into ModelNotUsable; want of memory stays as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, EncodeError):
        raise
    except Exception as error:
        raise ModelNotUsable(
            f"{failure} ({type(error).__name__}: {one_line(error)}). {advice}"
        ) from error


def _path(path: str) -> str:
    """Returns a file's or folder's absolute path, or anything else unchanged: the class knows what it is."""
    if path.startswith("package:"):
        return location(path)
    return str(Path(path).resolve()) if Path(path).exists() else path


def torch_parts(made: Any) -> dict[str, torch.nn.Module | Tensor]:
    """Returns the modules and tensors that an object consists of, by name: itself, or its attributes."""
    if isinstance(made, torch.nn.Module):
        return {"": made}
    attributes = getattr(made, "__dict__", {})
    return {k: v for k, v in attributes.items() if isinstance(v, torch.nn.Module | Tensor)}


def source_digest(made: Any) -> str | None:
    """Returns the sha256 of the file that defines an object's class; None where there is none."""
    try:
        file = inspect.getsourcefile(type(made))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except (OSError, TypeError):
        return None


def _array(values: Any) -> NDArray[np.float64]:
    """Returns numbers or a tensor as an array, without the axis of a batch of one."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    numbers = np.atleast_1d(np.array(array, np.float64))
    return numbers[0] if numbers.ndim == 4 and len(numbers) == 1 else numbers


def fixed_pictures(side: int) -> NDArray[np.uint8]:
    """Returns a picture of noise and one of gradients, (2, side, side, 3), by arithmetic that no release
    of a library changes.
    """
    index = np.arange(side * side * 3, dtype=np.uint64).reshape(side, side, 3)
    noise = (index * np.uint64(2_654_435_761) % np.uint64(2**32)) >> np.uint64(24)
    y, x = np.mgrid[:side, :side] * 255 // max(side - 1, 1)
    return np.stack([noise, np.stack([x, y, 255 - x], -1)]).astype(np.uint8)


def load_autoencoder(
    model: ModelSpec, device: str = "cpu", expected: str | None = None, *,
    config: MomentsColumn | LatentsColumn | None = None, **options: Any,
) -> Vae:  # fmt: skip
    """Returns a model of diffusers, or of a class of the user's own; `expected` is its `signature`.
    `options` say how one of diffusers runs.
    """
    make: Callable[..., Vae] = Vae
    if model.own:
        make, options = OwnVae, {k: v for k, v in options.items() if k == "resolution"}
    else:
        options.pop("resolution", None)
    return make(model, device, expected, config=config, **options)


def load_vae(
    encoder: EncoderIdentity | Json, device: str = "cpu", allow: Collection[str] = ()
) -> Vae:
    """Returns the VAE that a column's identity names (its `encoder`), its weights checked; a class of
    the user's own only where `allow` names it.
    """
    encoder = EncoderIdentity.of(encoder)
    return load_autoencoder(ModelSpec.of_identity(encoder, allow), device, expected_of(encoder))


def expected_of(encoder: EncoderIdentity) -> str:
    """Returns the `signature` of the encoder that an identity names."""
    if ":" not in encoder.cls:
        return encoder.weights
    known = {"weights": encoder.weights, "version": encoder.version, "outputs": encoder.outputs}
    return canonical_json(known).decode()
