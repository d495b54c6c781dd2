"""The number of rows in the index of each tar, without reading it whole."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from shards import Store
from shards.column import index_name, read_into
from shards.format import parse_index_head
from shards.format.atomic import parse_json

HEAD_BYTES = 1 << 17  # the first line of an index holds a note of at most 65,536 characters
READERS = 16  # small objects read at once: of an object store each takes a round trip


def index_heads(source: Store, shards: Iterable[int] | None = None) -> dict[int, int]:
    """Returns the rows of each tar that has an index (of all, or of some shards), from its first line."""

    def head(name: str) -> tuple[int, int]:
        handle = source.open(name)
        try:
            buffer = bytearray(min(HEAD_BYTES, source.length(handle, source.at(name))))
            read_into(source, handle, buffer, 0, source.at(name))
        finally:
            source.close(handle)
        try:
            record = parse_json(bytes(buffer).partition(b"\n")[0])
        except ValueError:
            record = {}
        index = parse_index_head(record, source.at(name))
        return index.shard, index.rows

    if shards is None:
        names = [name for name, _ in source.list("index")]
    else:
        names = [name for name in map(index_name, shards) if source.size(name) is not None]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(pool.map(head, names))
