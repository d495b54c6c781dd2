"""Several columns of one source, read together by row id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .commits import valid_rows
from .errors import IdentityMismatch, SourceMismatch
from .reader import Column
from .schema import Norm
from .storage import Json


class Join:
    """A moments column and a tokens column of one source, with the rows that are valid in both.

    `also`: further columns whose statuses are joined but which are not read, so that all runs of a
    comparison see the same rows. `truncated`: admit rows of status 1.
    """

    def __init__(
        self, latents: Column, text: Column, also: Sequence[Column] = (), truncated: bool = False
    ) -> None:
        for column, kind in ((latents, "moments"), (text, "tokens")):
            if column.layout.kind != kind:
                raise IdentityMismatch(
                    f"{column.path}: found a column of {column.layout.kind}, expected one of {kind}"
                )
        for column in (text, *also):
            check_same_source(latents, column)
        self.latents, self.text, self.also = latents, text, tuple(also)
        words = latents.words(truncated)
        for column in (text, *also):
            words &= column.words(truncated)
        self.words: NDArray[np.uint32] = words
        self.truncated = truncated

    @property
    def norm(self) -> Norm:
        """Of the latents; IdentityMismatch if the column has none."""
        if self.latents.spec.norm is None:
            raise IdentityMismatch(f"{self.latents.path}: the column records no shift and scale")
        return self.latents.spec.norm

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent: half the channels of the moments."""
        channels, height, width = self.latents.layout.row_shape
        return channels // 2, height, width

    @property
    def max_tokens(self) -> int:
        return self.text.layout.row_shape[0]

    @property
    def text_width(self) -> int:
        return self.text.layout.row_shape[1]

    @property
    def valid_rows(self) -> NDArray[np.int64]:
        """Row ids of all valid rows, ascending."""
        return valid_rows(self.words)

    def identity(self) -> Json:
        """What the columns are and which generation of them is read: pinned by checkpoints,
        compared on resume.
        """
        columns = {"latents": self.latents, "text": self.text}
        columns |= {f"also.{i}": column for i, column in enumerate(self.also)}
        return {
            name: {
                "identity": column.spec.identity,
                "norm": column.spec.record()["norm"],
                "column": column.digest,
                "complete": column.generation.digest,
            }
            for name, column in columns.items()
        } | {"truncated": self.truncated}


def open_join(
    latents: Path | str, text: Path | str, also: Sequence[Path | str] = (), truncated: bool = False
) -> Join:
    """Open and join complete columns; a named error says which one is absent, unfinished, damaged
    or foreign.
    """
    columns = [Column.open(path) for path in (latents, text, *also)]
    return Join(columns[0], columns[1], columns[2:], truncated)


def check_same_source(a: Column, b: Column) -> None:
    """Raise SourceMismatch unless both columns were made from the same rows."""
    found, expected = b.spec.identity["source"], a.spec.identity["source"]
    if found != expected:
        raise SourceMismatch(
            f"{b.path}: made from source {found}, but {a.path} from {expected}. Columns join by "
            "row number: "
            "use columns of one source, or encode the missing one"
        )
    if a.layout.shard_rows != b.layout.shard_rows:  # row 1 of tar 1 has another id in each
        raise SourceMismatch(
            f"{b.path}: {b.layout.shard_rows} rows a shard, but {a.path} has {a.layout.shard_rows}. "
            "Encode both with the same shard_rows"
        )
    pairs = zip(a.generation.index, b.generation.index, strict=True)
    wrong = [s for s, (x, y) in enumerate(pairs) if x and y and x != y]
    if wrong:
        raise SourceMismatch(
            f"{b.path} and {a.path}: shards {wrong[:8]} were read from tars that held different "
            "rows. "
            "Encode one of the two columns again"
        )
