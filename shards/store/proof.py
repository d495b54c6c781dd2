"""A copy inside an object store is proven before its source is deleted.

Stores may answer such a copy before it is done: Azure then says `x-ms-copy-status: pending`, shows
the new name empty or whole, and refuses to read it; if the source is deleted meanwhile, the copy
fails and the new name stays empty. The client library hides that status. So the last bytes of the
new object are read, and that one request also tells its size.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from ..errors import ShardsError, StoreError
from ..signals import asking
from .client import Client, TruncatedBody, pause, status_of

END = 1024  # last bytes of an object that are compared
UNFINISHED = (404, 409, 416)  # none there, a copy is pending, shorter than the range


class Bucket(Protocol):
    """What is asked of an object store."""

    _client: Client

    def at(self, name: str) -> str: ...
    def key(self, name: str) -> str: ...
    def call(self, work: str, name: str, action: Any, **options: Any) -> Any: ...
    def size(self, name: str) -> int | None: ...


class Unfinished(ShardsError):
    """The bytes that an object will have cannot be read yet."""


def prove(store: Bucket, name: str, size: int, end: bytes, source: str) -> None:
    """Waits until an object that the store copied from `source` has its size and its last bytes.

    Raises StoreError if it is not so within `give_up`; the source must then stay.
    """

    def shown() -> bool:
        return read_end(store, name, size, len(end)) == end if end else store.size(name) == size

    if not wait(store, shown):
        actual = store.size(name)
        raise StoreError(
            f"{store.at(name)}: the store said that it copied {store.at(source)} to it, but after "
            f"{store._client.limits.give_up:.0f} s its {size} bytes cannot be read "
            f"({'no object' if actual is None else f'{actual} bytes'} there). Nothing was deleted. "
            "Run again later; if it stays like this, delete this object first"
        )


def settle(store: Bucket, name: str) -> None:
    """Waits until an object that another writer made can be read: it may be copied to as yet.

    Raises StoreError if it is not so within `give_up`.
    """

    def readable() -> bool:
        size = store.size(name)
        return size is None or (size > 0 and read_end(store, name, size, 1) is not None)

    if not wait(store, readable):
        raise StoreError(
            f"{store.at(name)}: an object without bytes exists here; a copy inside the store that "
            "failed, or that is pending, leaves one. Nothing was written. Run again later; if it "
            "stays like this, delete this object first"
        )


def wait(store: Bucket, true: Any) -> bool:
    """Asks until an answer is true; returns whether it was within `give_up`."""
    limits, start, tries = store._client.limits, time.monotonic(), 0
    while True:
        try:
            if true():
                return True
        except (FileNotFoundError, Unfinished):
            pass
        if time.monotonic() - start > limits.give_up:
            return False
        tries += 1
        with asking():
            pause(min(limits.backoff * 2**tries, limits.max_backoff))


def read_end(store: Bucket, name: str, size: int, count: int) -> bytes:
    """Returns the last `count` bytes of an object; Unfinished if it is not of this `size`, or cannot
    be read yet.
    """

    def get(library: Any, bucket: Any) -> bytes:
        try:
            answer = library.get(bucket, store.key(name), options={"range": (size - count, size)})
        except library.exceptions.BaseError as error:
            if status_of(error) not in UNFINISHED:
                raise
            raise Unfinished(name) from None
        if answer.meta["size"] != size:
            raise Unfinished(name)
        data = bytes(answer.bytes())
        if len(data) != count:
            raise TruncatedBody(f"{len(data)} bytes came, {count} were asked for")
        return data

    data: bytes = store.call("reading", name, get)
    return data
