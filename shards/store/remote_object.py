"""One object of an object store or web server, open for reading."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import CorruptColumn, StoreError
from ..format.atomic import WRITE_BYTES
from ..signals import progressed
from .client import NoRanges, TruncatedBody
from .page_cache import File

BEYOND = re.compile(r"status code: 416\b")  # a range that starts where the object has ended


class First:
    """Of the answers to the first requests for objects: `lock` is held while one is looked at."""

    lock = threading.Lock()

    @classmethod
    def after_fork(cls) -> None:
        cls.lock = threading.Lock()


os.register_at_fork(after_in_child=First.after_fork)


class Bucket(Protocol):
    """What an open object asks of its store."""

    conditional: bool
    page_bytes: int

    def at(self, name: str) -> str: ...
    def key(self, name: str) -> str: ...
    def call(self, work: str, name: str, action: Any, **options: Any) -> Any: ...
    def size(self, name: str) -> int | None: ...


@dataclass(eq=False, slots=True)
class RemoteObject:
    """An object open for reading. `key` names its pages, and changes if the object does.

    `digest`: the sha256 that a commit says of it. Then nothing was asked of the store: the first
    answer has its size, which must be the committed one, and its etag, which all others must have.
    """

    store: Bucket
    name: str
    size: int
    etag: str | None
    cached: bool = True  # whether it is read through the pages
    digest: str | None = None
    key: str = field(init=False)
    pages: dict[int, File | None] = field(default_factory=dict)  # see `pages.Source`
    anew: bool = False
    beside: int = (
        0  # bytes that are to fit into the cache beside what is expected, or nothing is kept
    )

    def __post_init__(self) -> None:
        content = self.digest or self.etag
        version = f"{self.store.at(self.name)}\n{self.size}\n{content}\n{self.store.page_bytes}"
        self.key = hashlib.sha256(version.encode()).hexdigest()[:32]

    def fetch(self, start: int, length: int) -> Any:
        """Returns bytes of the object, by one request; repeated if fewer come.

        Raises FileNotFoundError, CorruptColumn where it is not of its committed size, or StoreError.
        """

        def get(library: Any, store: Any) -> Any:
            data = self._get_range(library, store, start, length).bytes()
            if len(data) != length:
                raise TruncatedBody(f"{len(data)} bytes came, {length} were asked for")
            return data

        try:
            return self.store.call("reading", self.name, get)
        except StoreError as error:
            if self.digest is None or not BEYOND.search(str(error)):
                raise
            self._check_size(self.store.size(self.name))
            raise

    def stream_range(self, start: int, length: int, take: Callable[[int, Any], None]) -> None:
        """Gives `take` the bytes of a range with their offsets, as they come. A request that breaks
        off is followed by one for the rest. Raises NoRanges where a server only gives whole objects.
        """
        done = 0

        def get(library: Any, store: Any) -> None:
            nonlocal done
            try:
                answer = self._get_range(library, store, start + done, length - done)
            except library.exceptions.NotSupportedError:
                raise NoRanges(f"{self.store.at(self.name)}: the server knows no ranges") from None
            for chunk in answer.stream(min_chunk_size=WRITE_BYTES):
                if len(chunk) > length - done:
                    raise TruncatedBody(f"more than the {length} bytes came that were asked for")
                take(start + done, chunk)
                progressed()
                done += len(chunk)
            if done < length:
                raise TruncatedBody(f"{done} bytes came, {length} were asked for")

        self.store.call("reading", self.name, get)

    def stream_whole(self, take: Callable[[int, Any], None]) -> None:
        """As `stream_range`, of a server that only gives whole objects: what breaks off begins anew."""

        def get(library: Any, store: Any) -> None:
            answer, done = self._checked(library.get(store, self.store.key(self.name))), 0
            for chunk in answer.stream(min_chunk_size=WRITE_BYTES):
                take(done, chunk)
                progressed()
                done += len(chunk)
            if done != self.size:
                raise TruncatedBody(f"{done} bytes came, the object has {self.size}")

        self.store.call("reading", self.name, get)

    def _get_range(self, library: Any, store: Any, start: int, length: int) -> Any:
        """Returns the answer to a request for a range."""
        options: dict[str, Any] = {"range": (start, start + length)}
        if self.etag is not None and self.store.conditional:
            options["if_match"] = self.etag
        return self._checked(library.get(store, self.store.key(self.name), options=options))

    def _checked(self, answer: Any) -> Any:
        """Returns an answer if it is of the object that was opened, or that the first answer was of.

        A store that takes conditions compares the etag itself, but several requests may be on their
        way before the first answer.
        """
        size, etag = answer.meta["size"], answer.meta["e_tag"]
        if self.digest is not None:
            with First.lock:
                self.etag = self.etag or etag
        elif self.store.conditional:
            return answer
        if etag != self.etag:
            raise self._replaced(size)
        self._check_size(size)
        return answer

    def _check_size(self, size: int | None) -> None:
        """Raises CorruptColumn or StoreError where the store has an object of another size."""
        if size == self.size:
            return
        if self.digest is None:
            raise self._replaced(size)
        raise CorruptColumn(
            f"{self.store.at(self.name)}: found {'nothing' if size is None else f'{size} bytes'}, "
            f"{self.size} are committed. Restore it, or repair the column"
        )

    def _replaced(self, size: int | None) -> StoreError:
        return StoreError(
            f"{self.store.at(self.name)}: it was replaced while it was open ({self.size} bytes "
            f"then, {size} now). Open it again"
        )
