"""A large object on its way to an object store, in parts."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..format.atomic import TEMPORARY

if TYPE_CHECKING:
    from .object_store import RemoteStore

PART = 8 << 20  # of an upload; a smaller object goes in one request
CONCURRENT = 4  # parts on their way at once
COPY_BYTES = 5 << 30  # the most that S3 copies on a condition


class Upload:
    """An object on its way: kept in memory while it is small, then sent in parts."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self._store, self._name = store, name
        folder = name.rpartition("/")[0]
        token = f"{TEMPORARY}{secrets.token_hex(8)}"
        self._temporary = f"{folder}/{token}" if folder else token
        self._kept = bytearray()
        self._writer: Any = None
        self._first: list[bytes] | None = []  # all that was sent, while that is little
        self._broken = False  # the writer failed
        self._sent = False  # the temporary object is whole
        self._sha = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def write(self, data: Any) -> None:
        """Append a bytes-like object."""
        view = memoryview(data)
        if not view.nbytes:  # an empty array has no flat view
            return
        view = view.cast("B")
        self._sha.update(view)
        self.bytes += view.nbytes
        if self.bytes > COPY_BYTES and self._store.url.startswith("s3://"):
            raise StoreError(
                f"{self._store.at(self._name)}: more than 5 GiB, which S3 cannot copy on a "
                "condition. Use shards of fewer rows, or write to a folder"
            )
        while view.nbytes:
            room = PART - len(self._kept)
            self._kept += view[:room]
            view = view[room:]
            if len(self._kept) == PART and view.nbytes:
                self._push()

    def _push(self, finish: bool = False) -> None:
        """Send what is kept, and with `finish` complete the upload.

        obstore repeats the request for a part, but not the one that starts an upload when its
        answer is cut; so the first parts are kept to begin anew. It reads what it is given later,
        so that must not change: it gets a copy.
        """
        given = [bytes(self._kept)]
        self._kept.clear()
        if self._first is not None:
            self._first += given

        def give(library: Any, store: Any) -> None:
            pieces = given
            if self._broken and self._first is not None:
                self._end()
                pieces = self._first
            self._broken = True
            if self._writer is None:
                self._writer = library.open_writer(
                    store, self._store.key(self._temporary),
                    buffer_size=PART, max_concurrency=CONCURRENT,
                )  # fmt: skip
            for piece in pieces:
                self._writer.write(piece)
            if finish:
                self._writer.close()
            self._broken = False

        once = self._first is None
        try:
            self._store.call("uploading", self._name, give, kind="upload", once=once)
        except (StoreError, FileNotFoundError):  # the answer to the last request may be lost, too
            if not finish or self._store.size(self._temporary) != self.bytes:
                raise
        if self._first is not None and len(self._first) > CONCURRENT:
            self._first = None

    def _end(self) -> None:
        """End an upload that will not be completed; what cannot be ended is litter."""
        left = (OSError, OSError("not published"), None)  # with an error, obstore ends the upload
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(StoreError, FileNotFoundError):
                self._store.call(
                    "ending the upload of", self._name,
                    lambda *_: writer.__exit__(*left), kind="upload", once=True,
                )  # fmt: skip

    def publish(self) -> bool:
        """Make the object appear; False if its name is taken, and then what stands stays.

        As with `put_if_absent`, a lost answer may make it False though the object is ours.
        """
        store, name = self._store, self._name
        if self._writer is None:
            return store.put_if_absent(name, bytes(self._kept))
        self._push(finish=True)
        self._sent = True
        if (found := store.size(self._temporary)) != self.bytes:
            raise StoreError(
                f"{store.at(name)}: {self.bytes} bytes were uploaded, {found} arrived. Run again"
            )
        if store.size(name) is not None:
            return False
        store._insist("copy")
        try:
            store._copy_new(self._temporary, name)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the copy was done, and the store knows its upload no more
            if store.size(name) is None:
                raise
            return False
        return True

    def discard(self) -> None:
        """Delete the temporary object, or end its upload."""
        self._kept.clear()
        self._first = None
        if self._sent:
            with suppress(StoreError):
                self._store.delete(self._temporary)
        else:
            self._end()
