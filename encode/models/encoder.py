"""What a run knows of an encoder; nothing here needs torch.

An `ImageEncoder` makes rows of one shape (moments, latents, features) from square crops, a
`CaptionEncoder` rows of any length (tokens, ids) from strings.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import ColumnSpec, Layout, Norm, Store
from shards.format import (
    COLUMN,
    VERSION,
    CaptionPreprocess,
    ColumnIdentity,
    EncoderIdentity,
    PicturePreprocess,
    calibrate,
    calibrate_rows,
)
from shards.format.atomic import Json

from ..config import ColumnConfig
from ..errors import EncodeError, ModelNotUsable
from ..registry import ModelSpec
from ..source.decoding import View
from ..source.images import DECODER

CALIBRATION_ROWS = 256  # captions that the channel scales of an int8 column are measured on
CALIBRATION_PICTURES = 128  # likewise

Words = NDArray[Any]  # of the element a column stores: float16, bfloat16 as uint16, int32


class Encoder(ABC):
    """A model and the column that it fills. `weights` is the digest of what decides the values: a
    model's weights, or a tokenizer.
    """

    config: Any  # a ColumnConfig, of the kind that the class is for
    model: ModelSpec
    weights: str

    device: Any = None  # a torch.device; a tokenizer has none

    @property
    def signature(self) -> str:
        """What the same encoder on another machine is known by."""
        return self.weights

    def identity(self) -> ColumnIdentity:
        """Returns the column's identity, but for the source."""
        return ColumnIdentity(
            kind=self.config.kind,
            preprocess=self.preprocess(),
            dtype=getattr(self.config, "element", "float16"),
            encoder=self.identified(),
        )

    def identified(self) -> EncoderIdentity:
        """Returns the identity of the model alone."""
        return self.model.identity(self.weights)

    def with_outputs_of(self, existing: Json) -> Json:
        """Returns those fields of an existing column's encoder that hold figures which are measured, and
        the same here but for rounding.
        """
        return {}

    @abstractmethod
    def preprocess(self) -> PicturePreprocess | CaptionPreprocess:
        """Returns how pictures or captions become the model's input."""

    def runs_on(self) -> Json:
        """Returns what commits record and nothing compares, as it may differ between two attempts: the
        device and its threads, and where the norm comes from.
        """
        if self.device is None:
            return {"device": platform.machine()}
        from .weights import device_record

        return device_record(self.device)

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """`Layout.row_shape` of the column."""


class ImageEncoder(Encoder):
    """Crops -> rows of one shape."""

    view: View

    def preprocess(self, **fields: Any) -> PicturePreprocess:
        return PicturePreprocess(
            image=self.view.suffix, resolution=self.view.resolution, decoder=DECODER,
            resize="bilinear, short side", crop="centre", **fields,
        )  # fmt: skip

    @property
    def norm(self) -> Norm | None:
        """Of latents; None for what is not normalised."""
        return None

    @abstractmethod
    def rows(self, images: NDArray[np.uint8]) -> Words:
        """Encodes (B, R, R, 3) uint8 -> (B, *row_shape) of 16-bit numbers, as they are stored but for
        int8, which the writer makes of them. A value that the element cannot hold becomes infinite,
        and the writer marks its row NON_FINITE.
        """

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a grey picture's row."""
        side = self.view.resolution
        return self.rows(np.full((1, side, side, 3), 128, np.uint8)).shape[1:]


class CaptionEncoder(Encoder):
    """Captions -> rows of any length."""

    suffix: str  # of the sample's member that holds the caption

    @abstractmethod
    def rows(self, captions: Sequence[str], budget: int) -> list[Words]:
        """Returns a row for each caption, in their order: (n, D) bfloat16 words, or (n,) ids. The
        captions are sorted by length and run in batches of at most `budget` tokens.
        """

    def lengths(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Returns the number of tokens that the column will hold of each caption, (B,)."""
        return np.array([len(row) for row in self.rows(captions, self.row_shape[0])], np.int64)

    @cached_property
    def blank(self) -> Words:
        """The row of a sample that has no caption: no tokens."""
        return self.rows([""], self.row_shape[0])[0][:0]


# Identity and layout -----------------------------------------------------------------------------


def layout_of(encoder: Encoder, shards: int, shard_rows: int) -> Layout:
    """Returns the layout of the column that an encoder fills; EncodeError if there is none."""
    config: ColumnConfig = encoder.config
    try:
        return Layout(
            config.kind, encoder.row_shape, shards, shard_rows, getattr(config, "element", ""),
            codec=config.codec, backend=config.backend,
        )  # fmt: skip
    except ModelNotUsable:
        raise
    except ValueError as error:
        raise EncodeError(f"a column of {config.kind}: {error}. Change its options") from None


def column_spec(
    encoder: Encoder, fingerprint: str, shards: int, shard_rows: int,
    scales: Callable[[], Json] | None = None, image: str | None = None,
) -> ColumnSpec:  # fmt: skip
    """Returns identity, layout and norm of the column that an encoder makes of a source, from the
    members of suffix `image`, where that is not the encoder's.

    `scales` returns the channel scales, and is called for a column of int8 alone: see
    `existing_scales`, `measured_scales` and `measured_row_scales`.
    """
    layout = layout_of(encoder, shards, shard_rows)
    identity = {**encoder.identity().record(), "source": fingerprint}
    if layout.quantised and scales is None:
        raise ValueError("an int8 column needs the scales of its channels")
    quantisation = scales() if layout.quantised and scales else None
    if isinstance(encoder, ImageEncoder):
        if image is not None:
            identity["preprocess"] = {**identity["preprocess"], "image": image}
        return ColumnSpec(identity, layout, encoder.norm, quantisation=quantisation)
    assert isinstance(encoder, CaptionEncoder)
    (empty,) = encoder.rows([""], layout.row_shape[0])
    return ColumnSpec(identity, layout, empty_tokens=len(empty), quantisation=quantisation)


def existing_scales(column: Store) -> Json | None:
    """Returns the channel scales of a column that exists, None without it or if it is not int8."""
    if column.size("column.json") is None:
        return None
    scales = column.unseal("column.json", COLUMN, VERSION).get("quantisation")
    return None if scales is None else dict(scales)


def measured_scales(encoder: CaptionEncoder, captions: Sequence[str | None], budget: int) -> Json:
    """Returns channel scales for int8, measured on the first captions of a tar; None and "" are
    passed over, and one caption at least must be left.
    """
    texts = [caption for caption in captions[:CALIBRATION_ROWS] if caption]
    return calibrate(np.concatenate(encoder.rows(texts, budget)), len(texts))


def measured_row_scales(
    encoder: ImageEncoder, images: NDArray[np.uint8], batch: int, layout: Layout
) -> Json:
    """Returns channel scales for int8, measured on the crops of a tar's first pictures, (n, R, R, 3)."""
    parts = [encoder.rows(images[first : first + batch]) for first in range(0, len(images), batch)]
    rows = np.concatenate([np.zeros((0, *layout.row_shape), np.float16), *parts])
    return calibrate_rows(rows, layout)
