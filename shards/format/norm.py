"""The normalisation of latents, z = (latent - shift) * scale: numbers, or arrays of them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, PlainValidator

from .atomic import Json, sha256
from .checks import mismatch

MAX_NUMBER = 1e30  # of a norm or a scale: float32 has room beyond
SHOWN = 120  # characters of a value in a message: two sha256 still differ in them


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def check_numbers(name: str, values: Sequence[float], divides: bool = False) -> None:
    """Raises ValueError unless float32 holds these numbers and, where they divide, none of them is 0."""
    sound = all(abs(value) <= MAX_NUMBER for value in values)  # false for a NaN, too
    if not values or not sound or (divides and 0 in np.array(values, np.float32)):
        raise ValueError(
            f"{name}: found {shown(list(values))}, expected finite numbers"
            f"{', none of them 0' if divides else ''}"
        )


def _numbers(values: Any, depth: int = 3) -> Any:
    """Returns a number, or nested tuples of the numbers in an array, in nested lists at most `depth`
    deep, or in an array's JSON form; ValueError for anything else.
    """
    if isinstance(values, dict) and depth == 3:
        values = _unpacked(values)
    if isinstance(values, np.ndarray | np.generic):
        values = values.tolist()
    if isinstance(values, list | tuple) and depth:
        return tuple(_numbers(value, depth - 1) for value in values)
    if type(values) not in (int, float):
        raise ValueError(mismatch(values, "a number" if depth < 3 else "a list of numbers"))
    return values


def _packed(array: NDArray[np.float32]) -> Json:
    """Returns the JSON form of an array: a third of the bytes of its numbers, and exact."""
    data = base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
    return {"shape": list(array.shape), "float32": data}


def _unpacked(record: Json) -> NDArray[np.float32]:
    """Inverts `_packed`; ValueError for any other JSON object."""
    shape, text = record.get("shape"), record.get("float32")
    if record.keys() != {"shape", "float32"} or not isinstance(text, str):
        raise ValueError(mismatch(record, "a list of numbers, or an object of shape and float32"))
    if not isinstance(shape, list) or len(shape) != 3 or any(type(n) is not int for n in shape):
        raise ValueError(f"shape: {mismatch(shape, 'three integers')}")
    data = base64.b64decode(text.encode(), validate=True)
    if min(shape) < 1 or len(data) != 4 * math.prod(shape):
        raise ValueError(f"found {len(data)} bytes of the shape {shape!r:.80}, expected 4 a number")
    return np.frombuffer(data, "<f4").reshape(shape)


def _flat(values: Any) -> Iterator[float]:
    """Yields the numbers of nested tuples in row-major order."""
    if not isinstance(values, tuple):
        yield values
        return
    for value in values:
        yield from _flat(value)


Numbers = Annotated[tuple[Any, ...], PlainValidator(_numbers)]


@dataclass(frozen=True)
class Norm:
    """Normalisation of latents (C, H, W), z = (latent - shift) * scale.

    Shift and scale are one number for all channels, a number for each, or an array of two or three
    axes that broadcasts to (C, H, W), as where each place of a channel has its own. They are given as
    lists or arrays and kept as (nested) tuples. Raises ValueError where float32 could not normalise
    by them and back.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    shift: Numbers
    scale: Numbers

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            values = _numbers(getattr(self, name))
            if not isinstance(values, tuple):
                raise ValueError(f"norm.{name}: {mismatch(values, 'a list of numbers')}")
            check_numbers(f"norm.{name}", list(_flat(values)), divides=name == "scale")
            object.__setattr__(self, name, values)
            if isinstance(values[0], tuple):  # as its record has it
                object.__setattr__(self, name, _numbers(self._array(name)))
        shapes = [axes.shape for axes in self.arrays]
        try:
            np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(
                f"norm: found {_count(self.shift)} shifts and {_count(self.scale)} scales, expected one of "
                "each or one for each channel"
            ) from None

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Shift and scale as fp32 arrays of three axes, which broadcast to (C, H, W)."""
        return self._array("shift"), self._array("scale")

    def _array(self, name: str) -> NDArray[np.float32]:
        values = getattr(self, name)
        try:
            array = np.array(values, np.float32)
        except ValueError:
            raise ValueError(
                f"norm.{name}: found lists of different lengths, expected an array that broadcasts to "
                "(C, H, W)"
            ) from None
        return array.reshape(-1, 1, 1) if array.ndim == 1 else array.reshape(-1, *array.shape[-2:])

    def check_shape(self, latent: tuple[int, ...]) -> None:
        """Raises ValueError unless shift and scale broadcast to latents of the shape (C, H, W)."""
        for name, values, array, nested in self._parts():
            axes = zip(array.shape, (*latent, 1, 1), strict=False)
            if all(size in (1, expected) for size, expected in axes):
                continue
            if nested:
                raise ValueError(
                    f"norm.{name}: found an array of {array.shape}, expected one that broadcasts to "
                    f"latents of {latent}"
                )
            raise ValueError(
                f"norm: found {len(values)} channels, expected 1 or the {latent[0]} of the latents"
            )

    def record(self) -> Json:
        """Returns the norm for column.json: a list where it is by channel, else an array's JSON form."""
        return {name: _packed(a) if nested else list(v) for name, v, a, nested in self._parts()}

    def summary(self) -> Json:
        """Returns `record`, with the digest of an array's fp32 values in place of them."""
        return summary_of(self.record())

    def _parts(self) -> Iterator[tuple[str, tuple[Any, ...], NDArray[np.float32], bool]]:
        """Yields name, numbers, fp32 array and whether the numbers are nested, of shift and scale."""
        for name, array in zip(("shift", "scale"), self.arrays, strict=True):
            values = getattr(self, name)
            yield name, values, array, isinstance(values[0], tuple)


def _count(values: tuple[Any, ...]) -> str:
    return str(len(values)) if not isinstance(values[0], tuple) else str(np.shape(values))


def summary_of(record: Json) -> Json:
    """Returns a norm's record with shape and sha256 of an array in place of its values, for settings that
    are compared and shown; what is no such record stays as it is.
    """
    summary = dict(record)
    for name, values in record.items():
        if isinstance(values, dict):
            with suppress(ValueError):
                array = _unpacked(values)
                summary[name] = {"shape": list(array.shape), "sha256": sha256(array.tobytes())}
    return summary
