"""Pictures and captions of a source by row id, from its tars: what its columns' encoders saw."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from encode.errors import TarChanged
from encode.source import caption_of, decode, read_exactly, transform
from shards import Column, IndexRow, NotAColumn, open_source, read_index, sha256
from shards.column import chosen, member_of, own_commit
from shards.format import PicturePreprocess

from ..errors import MissingPictures
from .layouts import Picture

SHARDS = 64  # whose index and open tar are kept


class Originals:
    """The source that a column was made of, and the folder of its tars. Threads may share it."""

    def __init__(self, column: Column, tars: Path) -> None:
        folder = column.store.parent
        self.source = open_source(folder)
        self._column, self._tars = column, tars
        self._index = lru_cache(SHARDS)(lambda shard: read_index(folder, shard).rows)
        self._tar = lru_cache(SHARDS)(self._open)

    def entry(self, row: int) -> IndexRow:
        shard, place = divmod(row, self.source.shard_rows)
        return self._index(shard)[place]

    def member(self, row: int, suffix: str) -> bytes:
        """Returns a sample's member; MissingPictures where its bytes are not the source's."""
        entry = self.entry(row)
        suffix = chosen(entry.members, suffix) or suffix
        offset, size = entry.members[suffix]
        try:
            data = self._tar(row // self.source.shard_rows).read(offset, size)
        except TarChanged:
            data = b""
        digest = entry.captions.get(suffix)
        if len(data) != size or (digest is not None and sha256(data) != digest):
            raise self._changed(row, f"{suffix} of {entry.key} is not what the source was made of")
        return data

    def crop(self, row: int, preprocess: PicturePreprocess) -> Picture:
        """Returns the picture as a column's encoder saw it."""
        image, _ = decode(self.member(row, preprocess.image))
        if image is None:
            raise self._changed(
                row, f"{self.entry(row).key} was a picture when the column was made and is none now"
            )
        return transform(image, preprocess.resolution)

    def caption(self, row: int, suffix: str) -> str:
        """Returns the caption of a column's `preprocess.caption`, before template and tokenizer."""
        member = chosen(self.entry(row).members, suffix) or member_of(suffix)
        text, _ = caption_of(self.member(row, member), member, suffix)
        if text is None:
            raise self._changed(
                row, f"{self.entry(row).key} was a caption when the column was made and is none now"
            )
        return text

    def check_tar(self, shard: int) -> None:
        """Raises MissingPictures unless a shard's tar is in the folder, with its size."""
        self._tar(shard)

    def _open(self, shard: int) -> _File:
        name, size = self.source.tars[shard]
        path = self._tars / name
        state = f"found {path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        if state != f"found {size:,} bytes":
            with suppress(NotAColumn):
                size = own_commit(self._column.store, self._column.digest, shard).tar_bytes(size)
        if state != f"found {size:,} bytes":
            raise MissingPictures(
                f"{path}: {state}, expected one of {size:,} bytes. Name the folder of the source's own tars with --tars"
            )
        return _File(path)

    def _changed(self, row: int, problem: str) -> MissingPictures:
        tar = self._tars / self.source.tars[row // self.source.shard_rows][0]
        return MissingPictures(f"{tar}: {problem}. Restore the tar")


class _File:
    """A file that is open as long as an object refers to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return read_exactly(self._descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)
