"""Columns joined by row id: several columns of one source, of one or several sources, read as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_rows
from ..column.mask import Mask
from ..column.statistics import MeasuredNorm
from ..errors import BadMask, IdentityMismatch, OrderError
from ..format.atomic import Json
from ..format.norm import Norm
from .column import Column
from .compatible import (
    Bad,
    check_bad,
    check_kind,
    check_mask,
    check_same_encoding,
    check_same_members,
    check_same_source,
    refuse_bad_rows,
)
from .objects import Ints
from .order import Order, Union


class SourceColumns:
    """The columns that are read of one source, and the rows that are valid in all of them.

    `text`: a tokens or ids column, or (column, rate) pairs, of which each sample takes one: the
    choice depends on (seed, sample number) alone. `also`: further columns whose statuses are joined
    but which are not read, so that all runs of a comparison see the same rows. `masks`: each leaves
    the rows out that it does not name. `truncated`: admit rows of status 1. `bad`: rows that are not
    valid in some column are left out ("skip"), or refused with BadRows ("error"). `extra`: columns
    of rows of one shape, read beside the latents. `snapshot_ids`: of some, by names in `identity`.
    """

    def __init__(
        self, latents: Column, text: Column | Sequence[tuple[Column, float]],
        also: Sequence[Column] = (), truncated: bool = False, *, bad: Bad = "skip",
        extra: Mapping[str, Column] | None = None, snapshot_ids: Mapping[str, Json] | None = None,
        masks: Sequence[Mask] = (),
    ) -> None:  # fmt: skip
        check_bad(bad)
        pairs = [(text, 1.0)] if isinstance(text, Column) else list(text)
        self.latents, self.truncated = latents, truncated
        self.texts, self.rates = tuple(c for c, _ in pairs), tuple(float(r) for _, r in pairs)
        self.also, self.extra = tuple(also), dict(extra or {})
        self._snapshot_ids = dict(snapshot_ids or {})
        self.masks = tuple(masks)
        if not pairs or not min(self.rates) > 0 or not abs(sum(self.rates) - 1) <= 1e-6:
            raise IdentityMismatch(
                f"text columns at the rates {list(self.rates)}: rates above 0 that add up to 1 "
                "expected"
            )
        check_kind(latents, "moments", "latents")
        for column in self.texts:
            check_kind(column, "tokens", "ids")
            check_same_encoding(self.texts[0], column)
        for name, column in self.extra.items():
            if column.layout.ragged:
                raise IdentityMismatch(
                    f"{column.path}: found rows of any length, expected rows of one shape for the "
                    f"extra column {name!r}"
                )
        columns = list(self.columns.values())
        for column in columns[1:]:
            check_same_source(latents, column)
        check_same_members(columns)
        # one bit for each row id, set where the row is valid in every column
        self.valid_mask: NDArray[np.uint32] = latents.valid_mask(truncated)
        for column in columns[1:]:  # in place: of a large source each has 100 MB
            self.valid_mask &= column.valid_mask(truncated)
        self.unmasked = self.rows  # how many would be valid without masks
        masked = None
        for mask in self.masks:
            check_mask(mask, latents)
            masked = mask.row_bits() if masked is None else masked & mask.row_bits()
        if masked is not None:
            self.valid_mask &= masked
            if self.unmasked and not self.valid_mask.any():
                raise BadMask(
                    f"{', '.join(mask.path for mask in self.masks)}: none of the {self.unmasked:,} rows "
                    f"that are valid in {latents.path} and its text is kept. Name another mask"
                )
        if bad == "error":
            refuse_bad_rows(columns, truncated, masked)

    @property
    def rows(self) -> int:
        """How many rows are valid."""
        return int(np.bitwise_count(self.valid_mask).sum())

    @property
    def columns(self) -> dict[str, Column]:
        """All columns, by the name that they have in `identity`."""
        texts = {f"text.{i}" if i else "text": column for i, column in enumerate(self.texts)}
        also = {f"also.{i}": column for i, column in enumerate(self.also)}
        extra = {f"extra.{name}": column for name, column in self.extra.items()}
        return {"latents": self.latents, **texts, **also, **extra}

    @property
    def valid_rows(self) -> Ints:
        """Row ids of all valid rows, ascending."""
        return valid_rows(self.valid_mask)

    def identity(self) -> Json:
        """Returns what the columns are and which snapshot of each is read."""
        record: Json = {"truncated": self.truncated}
        if len(self.texts) > 1:
            record["rates"] = list(self.rates)
        if self.masks:
            record["masks"] = sorted({mask.digest for mask in self.masks})
        for name, column in self.columns.items():
            if name not in self._snapshot_ids:  # once: COMPLETE may come while a run reads commits
                self._snapshot_ids[name] = column.snapshot_id()
            snapshot = self._snapshot_ids[name]
            record[name] = {
                "identity": column.spec.identity,
                "norm": column.spec.record()["norm"],
                "column": column.digest,
                "complete": snapshot["generation"],
            } | ({"shards": snapshot["shards"]} if snapshot["shards"] is not None else {})
        return record


class JoinedColumns:
    """The columns of one or several sources, read as one.

    Without weights the sources are concatenated: one order over the union, every row once an epoch.
    With weights each has epochs of its own, and a fixed share of the samples. All must agree in
    shapes, norm and encoders; IdentityMismatch names the fields. `by_source` has the columns
    source by source; what is asked of all is answered by the first, with which the others agree.
    """

    def __init__(
        self, by_source: Sequence[SourceColumns], weights: Sequence[float] | None = None
    ) -> None:
        first = by_source[0]
        for other in by_source[1:]:
            check_same_encoding(first.latents, other.latents)
            check_same_encoding(first.texts[0], other.texts[0])
            if first.extra.keys() != other.extra.keys():
                raise IdentityMismatch(
                    f"{other.latents.path}: found the extra columns {sorted(other.extra)} with it, "
                    f"but {sorted(first.extra)} with {first.latents.path}"
                )
            for name, column in first.extra.items():
                check_same_encoding(column, other.extra[name])
        if weights is not None and len(weights) != len(by_source):
            raise OrderError(
                f"{len(weights)} weights for {len(by_source)} sources: one each expected"
            )
        self.by_source = tuple(by_source)
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        self.measured: MeasuredNorm | None = None  # in place of the columns' own norm
        self._union = Union([source.valid_mask for source in by_source])

    # The order of samples -------------------------------------------------------------------------

    @property
    def valid_mask(self) -> NDArray[np.uint32]:
        """One bit for each row id, set where the row is valid; of all sources laid end to end."""
        return self._union.valid_mask

    @property
    def valid_masks(self) -> list[NDArray[np.uint32]]:
        """As `Order` takes them: of each source where they have weights, else of all end to end."""
        if self.weights is None:
            return [self.valid_mask]
        return [source.valid_mask for source in self.by_source]

    @property
    def valid_rows(self) -> Ints:
        """Row ids of all valid rows, ascending; of all sources laid end to end."""
        return valid_rows(self.valid_mask)

    def order(self, seed: int = 0, lanes: int = 64, window: int = 0) -> Order:
        """Returns the order of samples over these sources."""
        return Order(self.valid_masks, seed, lanes, window, self.weights)

    def locate(self, source: Ints, row: Ints) -> tuple[Ints, Ints]:
        """Returns (source, row id in it) of what `Order` calls (source, row id)."""
        return self._union.split(row) if self.weights is None else (source, row)

    # What all sources have in common --------------------------------------------------------------

    @property
    def latents(self) -> Column:
        return self.by_source[0].latents

    @property
    def text(self) -> Column:
        """The first text column, whose empty caption is that of all."""
        return self.by_source[0].texts[0]

    @property
    def texts(self) -> list[Column]:
        """The text columns of all sources."""
        return [column for source in self.by_source for column in source.texts]

    @property
    def norm(self) -> Norm:
        """Of the latents: that which was measured, or the column's; IdentityMismatch if it has none."""
        if self.measured is not None:
            return self.measured.norm
        if self.latents.spec.norm is None:
            raise IdentityMismatch(f"{self.latents.path}: the column records no shift and scale")
        return self.latents.spec.norm

    @property
    def norm_note(self) -> str:
        """Which norm latents have, for people: method, rows, digest, and what it divides by."""
        deviations = 1 / np.abs(self.norm.arrays[1])
        spread = f"divides by {deviations.min():.4g}"
        if deviations.size > 1:
            spread += f" to {deviations.max():.4g}"
        if self.measured is None:
            return f"norm of latents: that of the column, {spread}"
        rows, digest = self.measured.rows, self.measured.digest
        return (
            f"norm of latents: {self.measured.method} over {rows:,} rows, {spread}, {digest[:12]}"
        )

    @property
    def posterior(self) -> bool:
        """Whether latents are drawn from moments; else the column holds them."""
        return self.latents.layout.kind == "moments"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent: half the channels of moments."""
        channels, height, width = self.latents.layout.row_shape
        return channels // 2 if self.posterior else channels, height, width

    @property
    def max_tokens(self) -> int:
        return max(column.layout.row_shape[0] for column in self.texts)

    @property
    def ids(self) -> bool:
        """Whether the text is token ids, which an encoder has yet to run on; else it is tokens."""
        return self.text.layout.kind == "ids"

    @property
    def text_width(self) -> int | None:
        """Of a token; None for ids, of which only their encoder knows it."""
        return None if self.ids else self.text.layout.row_shape[1]

    @property
    def notes(self) -> list[str]:
        """What is read and how, for people: the norm, masks, ways to stores."""
        return [self.norm_note, *self.mask_notes, *self.storage_notes]

    @property
    def storage_notes(self) -> list[str]:
        """How columns in a store are read, for people."""
        columns = [c for s in self.by_source for c in (s.latents, *s.texts, *s.extra.values())]
        notes = [[c.storage_note for c in columns] for _ in range(2)]  # all decide about each
        return [note for note in notes[1] if note]

    @property
    def mask_notes(self) -> list[str]:
        """What masks leave of each source that has any, for people."""
        return [
            f"mask {', '.join(mask.path for mask in source.masks)}: {source.rows:,} of the "
            f"{source.unmasked:,} valid rows are read"
            for source in self.by_source
            if source.masks
        ]

    def identity(self) -> Json:
        """Returns what the columns are and which snapshot of each is read, further sources below
        `more`: pinned by checkpoints, compared on resume. `open_sources(pins=)` takes it back.
        """
        records = [source.identity() for source in self.by_source]
        if self.measured is not None:
            norm = {"norm": self.measured.norm.record(), "measured": self.measured.record()}
            for record in records:
                record["latents"] |= norm
        record, *more = records
        if more:
            record |= {"more": more, "weights": self.weights and list(self.weights)}
        return record

    def close(self) -> None:
        for source in self.by_source:
            for column in source.columns.values():
                column.close()


# Opening -----------------------------------------------------------------------------------------
