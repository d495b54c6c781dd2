"""Parquet as Hugging Face and img2dataset write it: pictures as bytes in a column, captions in another.

Rows are read a batch at a time and stay in their order, so nothing is sorted. pyarrow, an extra of
this project, is loaded here alone.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import NotASource
from ..source.places import natural
from .listing import Item, Source
from .table import CAPTION_NAMES, PICTURE_NAMES, column_named

BATCH = 32  # rows read at once: of large pictures, some hundred megabytes
MAGIC = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif",
    b"MM\0*": "tif",
}  # fmt: skip


def load_pyarrow() -> Any:
    """Returns pyarrow.parquet; NotASource with what to install where there is none."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise NotASource(
            "Parquet is read by pyarrow, which is not installed. Run `pip install "
            "'latentbank[parquet]'` or `pip install pyarrow`"
        ) from None


def picture_suffix(data: bytes) -> str:
    """Returns the suffix of a picture by its first bytes; jpg where they say nothing."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), "jpg")


class ParquetRows:
    """The rows of Parquet files in their order, as a `Listing` has those of folders and tables. A row's
    key is its file's name and its number there.
    """

    def __init__(
        self, files: Sequence[Path], source: Source, picture: str | None, caption: str | None
    ) -> None:
        self.source, self._arrow = source, load_pyarrow()
        digest = hashlib.sha256()
        self.rows = self.bytes = 0
        self._files: list[tuple[Path, int, str, str]] = []
        for path in files:
            with self._open(path) as file:
                names = self._columns(path, file.schema_arrow, picture, caption)
                rows = file.metadata.num_rows
            status = path.stat()
            words = (os.fsencode(path.name), status.st_size, status.st_mtime_ns, rows, names)
            digest.update(repr(words).encode())
            self._files.append((path, rows, *names))
            self.rows += rows
            self.bytes += status.st_size
        self.digest = digest.hexdigest()
        if len(set(map(key_stem, files))) < len(files):
            raise NotASource(
                f"{source.folder}: found Parquet files of one name, or of names that differ in dots "
                "alone: their rows would have the same keys. Pack each by itself"
            )

    def close(self) -> None:
        """Closes nothing: files are open while they are read."""

    def _open(self, path: Path) -> Any:
        try:
            return self._arrow.ParquetFile(path)
        except (OSError, ValueError) as error:  # its own errors are of these
            raise NotASource(f"{path}: no Parquet file ({error}). Fetch it again") from None

    def _columns(
        self, path: Path, schema: Any, picture: str | None, caption: str | None
    ) -> tuple[str, str]:
        """Returns the columns of pictures and captions, by type where no name is known."""
        types = {field.name: str(field.type) for field in schema}
        binary = [name for name, kind in types.items() if holds_bytes(kind)]
        texts = [n for n, t in types.items() if t in ("string", "large_string")]
        try:
            if picture is None and len(binary) == 1:
                picture = binary[0]
            if caption is None and len(texts) == 1:
                caption = texts[0]
            return (
                column_named(picture, PICTURE_NAMES, binary, "picture"),
                column_named(caption, CAPTION_NAMES, texts, "caption"),
            )
        except NotASource as error:
            schema_text = ", ".join(f"{name}: {kind}" for name, kind in types.items())
            raise NotASource(
                f"{path}: {error}. A picture's column holds bytes, or a struct of bytes and path. "
                f"The file has {schema_text[:500]}"
            ) from None

    def items(self, start: int) -> Iterator[Item]:
        """Yields the rows from number `start` on; row groups before it are not read."""
        number = 0
        for path, rows, picture, caption in self._files:
            if number + rows > start:
                with self._open(path) as file:
                    try:
                        yield from self._of_file(file, path, picture, caption, number, start)
                    except (OSError, ValueError) as error:
                        raise NotASource(f"{path}: damaged ({error}). Fetch it again") from None
            number += rows

    def _of_file(
        self, file: Any, path: Path, picture: str, caption: str, number: int, start: int
    ) -> Iterator[Item]:
        stem, row, groups = key_stem(path), 0, list[int]()
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if groups or number + row + count > start:
                groups.append(group)
            else:
                row += count
        for batch in file.iter_batches(
            BATCH, groups, columns=[picture, caption], use_threads=False
        ):
            for value, text in zip(batch.column(picture), batch.column(caption), strict=True):
                if number + row >= start:
                    data = value.as_py()
                    data = (data.get("bytes") if isinstance(data, dict) else data) or b""
                    caption_text = (text.as_py() or "").strip()
                    yield Item(
                        number + row, os.fsencode(f"{stem}-{row:08d}"), picture_suffix(data), data,
                        len(data), text=caption_text or None,
                    )  # fmt: skip
                row += 1


def holds_bytes(kind: str) -> bool:
    """Returns whether a column of this type holds files: bytes, or a struct with a field of bytes."""
    inner = re.search(r"^struct<(?:.*, )?bytes: (\w+)", kind)
    return (inner[1] if inner else kind) in ("binary", "large_binary", "binary_view")


def key_stem(path: Path) -> str:
    """Returns a file's name without its suffix and without dots."""
    return path.name.rpartition(".")[0].replace(".", "_")


def parquet_files(place: Path) -> list[Path]:
    """Returns the Parquet files of a folder or below it, 2.parquet before 10.parquet; or a file."""
    if place.is_file():
        return [place]
    files = [path for path in place.rglob("*.parquet") if path.is_file()]
    return sorted(files, key=lambda path: natural(str(path)))
