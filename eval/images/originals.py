"""Pictures and captions of a source by row id, from its tars: what the encoders of its columns were shown."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encode.errors import TarChanged
from encode.source.images import decode, transform
from encode.source.members import caption_in
from encode.source.tars import read_exactly
from shards import Column, IndexRow, open_source, read_index, sha256
from shards.column.members import member_of
from shards.format.identity import PicturePreprocess

from ..errors import MissingPictures

Json = dict[str, Any]
Picture = NDArray[np.uint8]  # (H, W, 3)
SHARDS = 64  # whose index and open tar are kept


class Originals:
    """The source that a column was made of; `tars` is the folder of its tars. Threads may share one."""

    def __init__(self, column: Column, tars: Path) -> None:
        folder = column.store.parent
        self.source = open_source(folder)
        self._tars = tars
        self._index = lru_cache(SHARDS)(lambda shard: read_index(folder, shard).rows)
        self._tar = lru_cache(SHARDS)(self._open)

    def _open(self, shard: int) -> "_File":
        name, size = self.source.tars[shard]
        path = self._tars / name
        found = f"found {path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        if found != f"found {size:,} bytes":
            raise MissingPictures(
                f"{path}: {found}, expected one of {size:,} bytes. Name the folder of the source's own tars with --tars"
            )
        return _File(path)

    def entry(self, row: int) -> IndexRow:
        shard, place = divmod(row, self.source.shard_rows)
        return self._index(shard)[place]

    def member(self, row: int, suffix: str) -> bytes:
        offset, size = self.entry(row).members[suffix]
        tar = self._tar(row // self.source.shard_rows)
        try:
            data = tar.read(offset, size)
        except TarChanged:
            data = b""
        captions = self.entry(row).captions
        if len(data) != size or (suffix in captions and sha256(data) != captions[suffix]):
            name = self._tars / self.source.tars[row // self.source.shard_rows][0]
            raise MissingPictures(
                f"{name}: {suffix} of {self.entry(row).key} is not what the source was made of. Restore the tar"
            )
        return data

    def crop(self, row: int, preprocess: PicturePreprocess) -> Picture:
        """Returns the picture as a column's encoder saw it."""
        image, _ = decode(self.member(row, preprocess.image))
        if image is None:
            raise self._gone(row, "picture")
        return transform(image, preprocess.resolution)

    def caption(self, row: int, suffix: str) -> str:
        """Returns the caption of a column's `preprocess.caption`, before template and tokenizer."""
        text, _ = caption_in(self.member(row, member_of(suffix)), suffix)
        if text is None:
            raise self._gone(row, "caption")
        return text

    def _gone(self, row: int, what: str) -> MissingPictures:
        tar = self._tars / self.source.tars[row // self.source.shard_rows][0]
        return MissingPictures(
            f"{tar}: {self.entry(row).key} was a {what} when the column was made and is none now. Restore the tar"
        )


class _File:
    """A file that is open as long as somebody has it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return read_exactly(self._descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)
