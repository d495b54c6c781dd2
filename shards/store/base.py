"""Where a column is: a folder, or a prefix in an object store, behind one seam.

A store is a small file system of objects. Names are relative, parted by `/`. Objects appear whole
or not at all and are never replaced; what is large is streamed in, and read in place by `preadv`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CorruptColumn, NotAColumn
from ..format.atomic import WHOLE_BYTES, Json, Staging, unseal_bytes
from ..format.layout import VERSION
from ..format.records import RECORD_BYTES, Sealed, parse

REMOTE = ("s3", "gs", "az")
WEB = ("http", "https")  # to be read only
BATCH, READERS = 256, 16  # sizes that a thread asks for, one after the other, and threads
R = TypeVar("R", bound=Sealed)
Handle = Any  # of an open object: a file descriptor, or what the store makes of one
Committed = tuple[int, str]  # bytes and sha256 of an object, as its commit says


def too_large(name: str, size: int, most: int) -> CorruptColumn:
    """Returns the error of an object that has more bytes than any of its kind."""
    return CorruptColumn(
        f"{name}: {size} bytes, at most {most} expected. Restore it, or encode again"
    )


class Store(ABC):
    """A folder of objects. Pickles; a copy in another process opens its own files."""

    url: str  # without a slash at the end
    folder: Path | None = None  # of a local store

    def at(self, name: str) -> str:
        """Returns the object's full name, for messages."""
        return f"{self.url}/{name}"

    @property
    def name(self) -> str:
        """Returns the last part of the url: how people call a column."""
        return self.url.rstrip("/").rpartition("/")[2]

    @abstractmethod
    def child(self, name: str) -> Store:
        """Returns the store of all names below `name`."""

    @property
    @abstractmethod
    def parent(self) -> Store:
        """Returns the store that this is a child of: of a column, its source."""

    # Whole objects --------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str, most: int = WHOLE_BYTES) -> bytes:
        """Returns a whole small object; FileNotFoundError if it is absent, CorruptColumn if it has more
        than `most` bytes.
        """

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Creates a small object; False if the name is taken, and then the other stays."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Writes or replaces an object that is derived from others, never a data object."""

    @abstractmethod
    def staged(self, name: str) -> Staging:
        """Creates a large object: `with store.staged(name) as f: f.write(...); f.publish()`."""

    def make_durable(self, name: str) -> None:  # noqa: B027  # an object store keeps what it shows
        """Lets a name outlive a power cut: its writer may have died just before that."""

    def touch(self, name: str) -> None:  # noqa: B027  # an object store can only write it again
        """Makes an object young again that is of no commit, but will be: `gc` then leaves it."""

    def unseal(self, name: str, kind: str, version: int) -> Json:
        """Returns a sealed record; see `unseal_bytes`. NotAColumn if it is absent."""
        try:
            data = self.read(name, RECORD_BYTES.get(kind, 1 << 20))
        except (FileNotFoundError, NotADirectoryError):
            raise NotAColumn(
                f"{self.at(name)}: no such file. Expected a {kind} record; check the path, or "
                "encode first"
            ) from None
        return unseal_bytes(data, self.at(name), kind, version)

    def record(self, name: str, model: type[R]) -> R:
        """Returns a record of a column or source, checked; NotAColumn, CorruptColumn or FormatVersion
        where it is absent, damaged or of another release.
        """
        return parse(self.unseal(name, model.KIND, VERSION), model, self.at(name))

    # Names ----------------------------------------------------------------------------------------

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Returns the bytes of an object; None if it is absent."""

    def sizes(self, names: Sequence[str]) -> Sequence[int | None]:
        """Returns the size of each of many objects."""
        parts = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
        with ThreadPoolExecutor(READERS) as pool:  # a network's file system takes its time for each
            sizes = pool.map(lambda part: [self.size(name) for name in part], parts)
            return [size for part in sizes for size in part]

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """Returns the names of the folders that are direct children."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """Returns (name, bytes) of every object below a folder, sorted, without what is being staged."""

    @abstractmethod
    def stale_temporaries(self, seconds: float) -> Sequence[str]:
        """Returns the names that interrupted writers left behind at least so long ago."""

    @abstractmethod
    def age(self, name: str) -> float | None:
        """Returns the seconds since an object was written; None if it is absent."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes an object if it exists. For `repair` and `gc` alone, under the lease."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Gives an object another name. For `repair` alone."""

    # Reading in place -----------------------------------------------------------------------------

    @abstractmethod
    def open(self, name: str, cached: bool = True, committed: Committed | None = None) -> Handle:
        """Opens an object for `preadv`; FileNotFoundError if it is absent. Without `cached` its bytes
        come from the store itself, past anything that is kept of it elsewhere. With `committed` a
        store afar is not asked for it before it is read.
        """

    @abstractmethod
    def length(self, handle: Handle, name: str) -> int:
        """Returns the bytes of an open object; an error says its `name`."""

    @abstractmethod
    def preadv(self, handle: Handle, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an open object as `os.preadv` does; returns how many bytes came."""

    def read_apart(self, handle: Handle, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers as `preadv` does, from a range whose surroundings are of no use with it."""
        return self.preadv(handle, buffers, offset)

    @abstractmethod
    def willneed(self, handle: Handle, offset: int, length: int, wanted: int = 0) -> None:
        """Says that a range will be read soon, `wanted` bytes of it all in all. Returns at once."""

    def expect(self, reader: object, size: int) -> None:  # noqa: B027  # a folder needs no plan
        """Says how many bytes of this store a reader, for as long as it lives, will read in any order."""

    @property
    def keeps(self) -> bool:
        """Returns whether what is fetched from a store afar is kept, however long before it is read."""
        return False

    @property
    def fetches(self) -> int:
        """Returns a number that grows when this process has fetched from a store afar what it keeps."""
        return 0

    @property
    def way(self) -> str:
        """Returns how a store afar is read in place, for people."""
        return ""

    @abstractmethod
    def close(self, handle: Handle) -> None:
        """Closes an open object."""

    def came_anew(self, handle: Handle) -> bool:
        """Returns whether bytes of an open object that were read before may have come over a network
        once more, since this was asked last.
        """
        return False

    def forget(self, handle: Handle, offset: int, length: int) -> bool:
        """Drops what is cached of a range, so that it is fetched again; False if nothing is ever
        cached.
        """
        return False


Place = Store | Path | str  # what a store may be named by
