"""What the index of a source says without being read whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from shards import Store
from shards.column.source import index_name
from shards.column.zarr_object import read_into
from shards.format.records import parse_index_head

HEAD_BYTES = 1 << 17  # the first line of an index holds a note of at most 65,536 characters


READERS = 16  # small objects read at once: of an object store each takes a round trip


def index_heads(source: Store, shards: Iterable[int] | None = None) -> dict[int, int]:
    """Rows of each tar whose index stands (of all, or of some shards), from its first line alone."""

    def head(name: str) -> tuple[int, int]:
        handle = source.open(name)
        try:
            buffer = bytearray(min(HEAD_BYTES, source.length(handle, source.at(name))))
            read_into(source, handle, buffer, 0, source.at(name))
        finally:
            source.close(handle)
        line = bytes(buffer).partition(b"\n")[0]
        try:
            found = json.loads(line)
        except ValueError:
            found = {}
        record = parse_index_head(found, source.at(name))
        return record.shard, record.rows

    if shards is None:
        names = [name for name, _ in source.list("index")]
    else:
        names = [n for n in map(index_name, shards) if source.size(n) is not None]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(pool.map(head, names))
