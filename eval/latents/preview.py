"""`python -m eval preview COLUMN`: rows of a column on one page, as they are cached.

Latents are decoded beside the pictures that they are of, with the rows nearest to them; of tokens, ids
and features there is a table. What cannot be shown is said on the page, with the flag that names it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encode.errors import EncodeError
from encode.models import Vae, load_vae, to_images
from shards import Column, ShardsError, Status, atomic_write
from shards.column import read_failures, valid_rows
from shards.console import Bar, counted
from shards.format import HAS_VALUES
from shards.printing import one_line, printable
from shards.probe import common_rows, evenly
from shards.read import check_kind

from ..errors import BadRequest, EvalError, OtherImages
from ..images.encoders import relocate_encoder
from ..images.originals import Originals
from ..report.gallery import MOST_BYTES, SIDES, thumbnail
from ..report.page import page_of
from .interpolation import BLOCK, means, nearest, normalised

Json = dict[str, Any]
Ints = NDArray[np.int64]
MOST_ROWS = 1_000  # of a page
NEIGHBOURS = 3
NEAR_SIDE = 96  # of a neighbour's picture, in pixels
BYTES_A_PIXEL = 0.35  # of a thumbnail in the page, at most in nearly all pictures
UNREADABLE = (ShardsError, EvalError, EncodeError, OSError)
REASONS = {
    Status.TRUNCATED: "the picture's file is cut off; what is missing is grey",
    Status.IMAGE_UNDECODABLE: "the picture's file cannot be decoded",
    Status.IMAGE_MISSING: "the sample has no picture",
    Status.CAPTION_MISSING: "the sample has no caption",
    Status.CAPTION_UNDECODABLE: "the caption is not text",
    Status.NON_FINITE: "the encoder returned values that are not finite, or too large to store",
    Status.SHARD_FAILED: "its shard was not encoded",
}


@dataclass
class Cell:
    """A row of the page; pictures are data URIs with their sizes, None where there is none."""

    row: int
    status: Status
    key: str | None = None
    caption: str | None = None
    tokens: int | None = None
    notes: list[str] = field(default_factory=list)  # why something is not shown
    source: Json | None = None
    decoded: Json | None = None
    neighbours: list[Json] = field(default_factory=list)  # row, cosine, picture

    @property
    def stored(self) -> bool:
        """Whether the column holds values of the row."""
        return self.status in HAS_VALUES


def run(args: argparse.Namespace) -> None:
    """Writes the page that the flags ask for, and prints its path."""
    out: Path = args.out
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir() or not out.parent.is_dir():
        raise BadRequest(
            f"{out}: expected the name of a page, such as preview.html, in a folder that exists"
        )
    column = Column.open(args.column)
    status = Status[args.status.upper()] if args.status else None
    if args.rows and status is not None:
        raise BadRequest(
            "found both --rows and --status, expected one: rows of a status are chosen"
        )
    cells = cells_of(column, args.rows, status, args.count)
    if not cells:
        name = status.name.lower() if status else "ok"
        print(f"{column.path}: no row has the status {name}, so there is nothing to show")
        return
    page = Preview(column, cells, args).page()
    atomic_write(out, printable(page).encode())
    print(out)


def cells_of(column: Column, rows: str | None, status: Status | None, count: int) -> list[Cell]:
    """Returns the cells of named rows, or of `count` rows of a status (of valid ones), evenly apart.

    BadRequest for rows that are repeated or that the column does not have.
    """
    if count > MOST_ROWS:
        raise BadRequest(f"found --count {count:,}, expected at most {MOST_ROWS:,} rows of a page")
    if rows is not None:
        return [Cell(row, status_of(column, row)) for row in rows_named(rows)]
    if status is None:
        rows_shown = evenly(valid_rows(column.valid_mask()), count)
        return [Cell(row, Status.OK) for row in rows_shown.tolist()]
    parts = [np.zeros(0, np.int64)]
    for shard, held in enumerate(column.snapshot.rows):
        first = shard * column.layout.shard_rows
        ids = np.arange(first, first + held)
        if held:
            parts.append(ids[column.status(ids) == status])
        elif column.snapshot.content[shard] is None and status is Status.SHARD_FAILED:
            parts.append(np.array([first]))  # for the shard: how many rows it has is not known
    return [Cell(row, status) for row in evenly(np.concatenate(parts), count).tolist()]


def status_of(column: Column, row: int) -> Status:
    """Returns the status of a row id; BadRequest where the column has no such row."""
    shard, place = divmod(row, column.layout.shard_rows)
    rows = column.snapshot.rows
    if shard < len(rows) and column.snapshot.content[shard] is None:
        return Status.SHARD_FAILED
    if shard >= len(rows) or place >= rows[shard]:
        least = min(shard, len(rows) - 1)
        first = least * column.layout.shard_rows
        held = f"rows {first} to {first + rows[least] - 1}" if rows[least] else "no rows"
        raise BadRequest(f"--rows: {column.path} has no row {row}; shard {least} has {held}")
    return Status(int(column.status(np.array([row]))[0]))


def rows_named(text: str) -> list[int]:
    """Returns the row ids of "0,5,100-120" in their order; BadRequest for other text and repeated rows."""
    rows: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*", part)
        if match is None:
            raise BadRequest(f"found --rows {text!r}, expected row ids and ranges: 0,5,100-120")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_ROWS or len(rows) >= MOST_ROWS:
            raise BadRequest(
                f"found --rows {part.strip()}, expected a range from the lower to the higher row, and at most "
                f"{MOST_ROWS:,} rows in all"
            )
        rows += range(first, last + 1)
    if repeated := [row for row in dict.fromkeys(rows) if rows.count(row) > 1]:
        raise BadRequest(f"--rows: row {repeated[0]} is named twice. Name each row once")
    return rows


class Preview:
    """What a page shows of a column's rows. What was named by a flag must be usable before anything is
    decoded; what was not named is left out, and `missing` says so.
    """

    def __init__(self, column: Column, cells: Sequence[Cell], args: argparse.Namespace) -> None:
        self.column, self.cells, self.args = column, cells, args
        self.missing: list[str] = []
        self.latents = column.layout.kind in ("moments", "latents")
        self.text = self._text()
        self.originals = self._originals()
        self.decoder = self._decoder() if self.latents else None

    def page(self) -> str:
        """Returns the page's HTML."""
        pictures = len(self.cells) * 2
        fits = (s for s in SIDES if pictures * s**2 * BYTES_A_PIXEL <= MOST_BYTES)
        side = next(fits, SIDES[-1])
        latents: dict[int, Tensor] = {}
        with Bar("rows", len(self.cells), "rows") as bar:
            failures = read_failures(self.column.store)
            for cell in self.cells:
                self._describe(cell, failures, side)
                if (values := self._stored(cell)) is not None:
                    latents[cell.row] = values
                bar.advance(1)
        self._decode(latents, side)
        if latents:
            self._find_neighbours(latents)
        path = Path(__file__).parents[1] / "report" / "preview.html.j2"
        return page_of(
            path,
            f"Rows of {one_line(self.column.name)}",
            column=self.column,
            cells=self.cells,
            missing=self.missing,
            latents=self.latents,
            tokens=self.text is not None or self.column.layout.ragged,
        )

    def _text(self) -> Column | None:
        if self.args.text is None:
            if self.latents:
                self.missing.append("No token lengths: name a column of captions by --text.")
            return None
        text = Column.open(self.args.text)
        check_kind(text, "tokens", "ids")
        common_rows([self.column, text])  # raises for another source
        return text

    def _originals(self) -> Originals | None:
        tars: Path | None = self.args.tars
        if tars is None:
            shown = "pictures of the source and no captions" if self.latents else "captions"
            self.missing.append(f"No {shown}: name the folder of the source's tars by --tars.")
        # a shard that was not encoded may lack its tar, and its index
        encoded = [cell.row for cell in self.cells if cell.status is not Status.SHARD_FAILED]
        try:
            originals = Originals(self.column, tars or Path())
            if encoded:
                originals.entry(encoded[0])
        except UNREADABLE as error:
            if tars is not None:
                raise
            self.missing.append(f"No keys: {one_line(str(error))}")
            return None
        if tars is not None:
            for shard in sorted({row // self.column.layout.shard_rows for row in encoded}):
                originals.check_tar(shard)
        return originals

    def _decoder(self) -> Vae | None:
        try:
            encoder = relocate_encoder(self.column.identity.encoder, self.args.vae)
            return load_vae(encoder, self.args.device, self.args.allow_class or ())
        except UNREADABLE as error:
            if self.args.vae is not None:
                raise
            self.missing.append(
                f"No decoded pictures: {one_line(str(error)).rstrip('.')}. --vae names the VAE's folder."
            )
            return None

    def _describe(self, cell: Cell, failures: dict[int, str], side: int) -> None:
        """Sets key, caption, tokens and the source's picture of a cell."""
        shard = cell.row // self.column.layout.shard_rows
        if cell.status is not Status.OK:
            why = failures.get(shard) if cell.status is Status.SHARD_FAILED else None
            cell.notes.append(one_line(why or REASONS.get(cell.status, "")))
        captions = self.text or (self.column if self.column.layout.ragged else None)
        if captions is not None:
            lengths = self._try(cell, "tokens", lambda: captions.lengths(np.array([cell.row])))
            cell.tokens = None if lengths is None else int(lengths[0])
        if self.originals is None:
            return
        originals = self.originals
        entry = self._try(cell, "key", lambda: originals.entry(cell.row))
        if entry is None:
            return
        cell.key = one_line(entry.key)
        if self.args.tars is None:
            return
        suffix = self._caption(entry.members)
        if suffix is not None:
            caption = self._try(cell, "caption", lambda: originals.caption(cell.row, suffix))
            cell.caption = None if caption is None else one_line(caption)
        if self.latents and cell.status != Status.IMAGE_MISSING:
            picture = self.column.identity.picture
            crop = self._try(cell, "source picture", lambda: originals.crop(cell.row, picture))
            cell.source = None if crop is None else thumbnail(crop, side)

    def _caption(self, members: Any) -> str | None:
        """Returns the member that is a row's caption: that of a column of captions, else txt."""
        for column in (self.text, self.column):
            if column is not None and column.layout.kind in ("tokens", "ids"):
                return column.identity.text.caption or "txt"
        return "txt" if "txt" in members else None

    def _stored(self, cell: Cell) -> Tensor | None:
        """Returns the mean or latent (C, H, W) of a row; None, with a note, where it is damaged."""
        if not cell.stored:
            return None
        read = means if self.latents else partial(Column.read, check=True)
        stored = self._try(cell, "values", lambda: read(self.column, np.array([cell.row])))
        if stored is None or not self.latents:
            return None
        values: Tensor = stored[0]
        if not bool(torch.isfinite(values).all()):
            cell.notes.append("no decoded picture: its values are not finite")
            return None
        return values

    def _try(self, cell: Cell, what: str, read: Callable[[], Any]) -> Any:
        """Returns what `read` does; None, with a note on the cell, where it cannot be read."""
        try:
            return read()
        except (*UNREADABLE, IndexError, KeyError) as error:
            cell.notes.append(f"no {what}: {one_line(str(error)) or 'there is none'}")
            return None

    def _decode(self, latents: dict[int, Tensor], side: int) -> None:
        """Sets the decoded pictures of cells."""
        pictures = self._pictures(
            list(latents), lambda rows: torch.stack([latents[row] for row in rows]), side, "decoded"
        )
        for cell in self.cells:
            cell.decoded = pictures.get(cell.row)

    def _pictures(
        self, rows: Sequence[int], latents: Callable[[Sequence[int]], Tensor], side: int, name: str
    ) -> dict[int, Json]:
        """Returns the thumbnails of rows, decoded by blocks of their `latents`; none without a decoder."""
        pictures = dict[int, Json]()
        if self.decoder is None:
            return pictures
        size: int = self.args.batch_size
        with Bar(name, len(rows), "pictures") as bar:
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                decoded = to_images(self.decoder.decode(latents(part)))
                pictures |= {
                    row: thumbnail(picture, side)
                    for row, picture in zip(part, decoded, strict=True)
                }
                bar.advance(len(part))
        return pictures

    def _find_neighbours(self, latents: dict[int, Tensor]) -> None:
        """Sets the rows of the column nearest to each cell by cosine of normalised latents."""
        if self.column.spec.norm is None:
            self.missing.append("No neighbours: the column records no shift and scale.")
            return
        cells = [cell for cell in self.cells if cell.row in latents]
        rows = evenly(valid_rows(self.column.valid_mask()), self.args.reference_rows)
        kept = list[Ints]()
        damaged: list[int] = []

        def blocks() -> Iterator[Tensor]:
            with Bar("neighbours", len(rows), "rows") as bar:
                for start in range(0, len(rows), BLOCK):
                    part = rows[start : start + BLOCK]
                    for sound, values in self._sound(part, damaged):
                        kept.append(sound)
                        yield values.flatten(1).to(self.args.device)
                    bar.advance(len(part))

        queries = normalised(self.column, np.array([cell.row for cell in cells])).flatten(1)
        index, cosines = nearest(queries.to(self.args.device), blocks(), NEIGHBOURS + 1)
        reference = np.concatenate(kept) if kept else rows[:0]
        for cell, places, values in zip(cells, index.tolist(), cosines.tolist(), strict=True):
            pairs = [(int(reference[i]), c) for i, c in zip(places, values, strict=True)]
            others = [(row, cosine) for row, cosine in pairs if row != cell.row][:NEIGHBOURS]
            cell.neighbours = [{"row": r, "cosine": c, "picture": None} for r, c in others]
        self._decode_neighbours(cells)
        note = f"Neighbours are among {counted(len(reference), 'valid row')}"
        note += "" if len(rows) == len(valid_rows(self.column.valid_mask())) else ", evenly apart"
        note += f"; {counted(len(damaged), 'row')} of them cannot be read" if damaged else ""
        self.missing.append(f"{note}. Their numbers are cosines of normalised latents.")

    def _decode_neighbours(self, cells: Sequence[Cell]) -> None:
        rows = sorted({near["row"] for cell in cells for near in cell.neighbours})
        pictures = self._pictures(
            rows, lambda part: means(self.column, np.array(part)), NEAR_SIDE, "near"
        )
        for cell in cells:
            for near in cell.neighbours:
                near["picture"] = pictures.get(near["row"])

    def _sound(self, rows: Ints, damaged: list[int]) -> Iterator[tuple[Ints, Tensor]]:
        """Yields the rows that can be read with their latents, and adds the others to `damaged`."""
        try:
            values = normalised(self.column, rows)
        except (ShardsError, OtherImages, OSError):
            if len(rows) == 1:
                damaged.append(int(rows[0]))
                return
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                yield from self._sound(half, damaged)
        else:
            yield rows, values
