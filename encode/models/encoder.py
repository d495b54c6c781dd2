"""Columns and what fills them, as an engine sees it.

An engine knows two shapes. An `ImageEncoder` takes square crops and gives rows of one shape
(moments, latents, features); a `CaptionEncoder` takes strings and gives rows of any length (tokens,
ids). Which model stands behind is the business of `encoders` alone, which needs torch; nothing here
does.
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
from shards.format.atomic import Json
from shards.format.int8 import calibrate
from shards.format.layout import COLUMN, VERSION

from ..config import ColumnConfig
from ..errors import EncodeError, ModelNotUsable
from ..source.decoding import View

CALIBRATION_ROWS = 256  # captions that the channel scales of an int8 column are measured on

Words = NDArray[Any]  # of the element a column stores: float16, bfloat16 as uint16, int32


class Encoder(ABC):
    """A column's config and the model that fills it. `weights` is the digest of what decides the
    values: a model's weights, or a tokenizer.
    """

    config: ColumnConfig
    weights: str
    model: Any  # what encode.models.vae, encode.models.text or encode.models.features has loaded

    @abstractmethod
    def identity(self) -> Json:
        """The column's identity, but for the source."""

    def runs_on(self) -> Json:
        """The device, and its threads where they matter: may differ between two attempts."""
        return {"device": platform.machine()}

    @abstractmethod
    def row(self) -> tuple[int, ...]:
        """`Layout.row_shape` of the column."""


class ImageEncoder(Encoder):
    """Crops -> rows of one shape."""

    view: View

    @property
    def norm(self) -> Norm | None:
        """Of latents; None for what is not normalised."""
        return None

    @abstractmethod
    def encode(self, images: NDArray[np.uint8]) -> Words:
        """(B, R, R, 3) uint8 -> (B, *row_shape) as they are stored. A value that the element cannot
        hold becomes infinite, and the writer marks its row NON_FINITE.
        """

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row, found by encoding a grey picture."""
        side = self.view.resolution
        return self.encode(np.full((1, side, side, 3), 128, np.uint8)).shape[1:]

    def row(self) -> tuple[int, ...]:
        return self.row_shape


class CaptionEncoder(Encoder):
    """Captions -> rows of any length."""

    suffix: str  # of the sample's member that holds the caption

    @abstractmethod
    def encode(self, captions: Sequence[str], budget: int) -> list[Words]:
        """A row for each caption, in their order: (n, D) bfloat16 words, or (n,) ids. A call's
        captions are sorted by length and run in batches of at most `budget` tokens.
        """

    def lengths(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens that the column will hold of each caption, (B,); here by encoding them."""
        return np.array([len(row) for row in self.encode(captions, self.row()[0])], np.int64)

    @property
    @abstractmethod
    def blank(self) -> Words:
        """The row of a sample that has no caption: no tokens."""


# Identity and layout -----------------------------------------------------------------------------


def layout_of(encoder: Encoder, shards: int, shard_rows: int) -> Layout:
    """The layout of the column that an encoder fills; EncodeError if there is none."""
    how = encoder.config
    try:
        return Layout(
            how.kind, encoder.row(), shards, shard_rows, getattr(how, "element", ""),
            codec=how.codec, backend=how.backend,
        )  # fmt: skip
    except ModelNotUsable:
        raise
    except ValueError as error:
        raise EncodeError(f"a column of {how.kind}: {error}. Change its options") from None


def column_spec(
    encoder: Encoder, fingerprint: str, shards: int, shard_rows: int,
    scales: Callable[[], Json] | None = None,
) -> ColumnSpec:  # fmt: skip
    """Identity, layout and norm of the column that an encoder makes of a source.

    `scales` is asked for the channel scales if, and only if, the column is stored as int8: see
    `standing_scales` and `measured_scales`.
    """
    layout = layout_of(encoder, shards, shard_rows)
    identity = {**encoder.identity(), "source": fingerprint}
    if isinstance(encoder, ImageEncoder):
        return ColumnSpec(identity, layout, encoder.norm)
    assert isinstance(encoder, CaptionEncoder)
    if layout.quantised and scales is None:
        raise ValueError("an int8 column needs the scales of its channels")
    found = scales() if layout.quantised and scales else None
    (empty,) = encoder.encode([""], encoder.row()[0])
    return ColumnSpec(identity, layout, empty_tokens=len(empty), quantisation=found)


def standing_scales(column: Store) -> Json | None:
    """The channel scales of an int8 column that stands, if one does."""
    if column.size("column.json") is None:
        return None
    found = column.unseal("column.json", COLUMN, VERSION).get("quantisation")
    return None if found is None else dict(found)


def measured_scales(encoder: CaptionEncoder, captions: Sequence[str | None], budget: int) -> Json:
    """Channel scales for int8, from the first captions of a tar; None and "" are passed over, and
    one at least must be left.
    """
    there = [caption for caption in captions[:CALIBRATION_ROWS] if caption]
    return calibrate(np.concatenate(encoder.encode(there, budget)), len(there))
