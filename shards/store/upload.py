"""A large object on its way to an object store, in parts."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any, Protocol

from ..errors import StoreError
from ..format.atomic import TEMPORARY, Staging
from .proof import END, Bucket, prove, settle

PART = 8 << 20  # of an upload; a smaller object goes in one request
CONCURRENT = 4  # parts on their way at once
COPY_BYTES = 5 << 30  # the most that S3 copies on a condition


class Target(Bucket, Protocol):
    """What an upload asks of its object store."""

    url: str

    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def delete(self, name: str) -> None: ...
    def _require(self, condition: str) -> None: ...
    def _copy_new(self, name: str, to: str) -> None: ...


class Upload(Staging):
    """An object on its way: kept in memory while it is small, then sent in parts."""

    def __init__(self, store: Target, name: str) -> None:
        super().__init__()
        self._store, self._name = store, name
        folder = name.rpartition("/")[0]
        token = f"{TEMPORARY}{secrets.token_hex(8)}"
        self._temporary = f"{folder}/{token}" if folder else token
        self._buffer = bytearray()
        self._writer: Any = None
        self._first_parts: list[bytes] | None = []  # all that was sent, while that is little
        self._broken = False  # the writer failed
        self._sent = False  # the temporary object is whole
        self._copying = False  # the store was asked to copy it, and is not known to be done

    def _append(self, view: memoryview) -> None:
        if self.bytes > COPY_BYTES and self._store.url.startswith("s3://"):
            raise StoreError(
                f"{self._store.at(self._name)}: more than 5 GiB, which S3 cannot copy on a "
                "condition. Use shards of fewer rows, or write to a folder"
            )
        while view.nbytes:
            room = PART - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == PART and view.nbytes:
                self._push()

    def _push(self, finish: bool = False) -> None:
        """Sends the buffer, and with `finish` completes the upload.

        obstore repeats the request for a part, but not the one that starts an upload when its
        answer is cut; so the first parts are kept to begin anew. It reads its input later, so that
        must not change: it gets a copy.
        """
        new_parts = [bytes(self._buffer)]
        self._buffer.clear()
        if self._first_parts is not None:
            self._first_parts += new_parts

        def send(library: Any, store: Any) -> None:
            parts = new_parts
            if self._broken and self._first_parts is not None:
                self._end()
                parts = self._first_parts
            self._broken = True
            if self._writer is None:
                self._writer = library.open_writer(
                    store, self._store.key(self._temporary),
                    buffer_size=PART, max_concurrency=CONCURRENT,
                )  # fmt: skip
            for part in parts:
                self._writer.write(part)
            if finish:
                self._writer.close()
            self._broken = False

        once = self._first_parts is None
        try:
            self._store.call("uploading", self._name, send, kind="upload", once=once)
        except (StoreError, FileNotFoundError):  # the answer to the last request may be lost, too
            if not finish or self._store.size(self._temporary) != self.bytes:
                raise
        if self._first_parts is not None and len(self._first_parts) > CONCURRENT:
            self._first_parts = None

    def _end(self) -> None:
        """Ends an upload that will not be completed; what cannot be ended stays as a temporary."""
        failure = (OSError, OSError("not published"), None)  # with it, obstore ends the upload
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(StoreError, FileNotFoundError):
                self._store.call(
                    "ending the upload of", self._name,
                    lambda *_: writer.__exit__(*failure), kind="upload", once=True,
                )  # fmt: skip

    def publish(self) -> bool:
        """Makes the object appear; False if its name is taken, and then the other stays.

        As with `put_if_absent`, a lost answer may make it False though the object is ours.
        """
        store, name = self._store, self._name
        if self._writer is None:
            return store.put_if_absent(name, bytes(self._buffer))
        end = bytes(self._buffer[-END:])
        self._push(finish=True)
        self._sent = True
        if (size := store.size(self._temporary)) != self.bytes:
            raise StoreError(
                f"{store.at(name)}: {self.bytes} bytes were uploaded, {size} arrived. Run again"
            )
        if store.size(name) is not None:
            settle(store, name)
            return False
        store._require("copy")
        self._copying = True
        try:
            store._copy_new(self._temporary, name)
        except (FileExistsError, FileNotFoundError) as error:
            # of the second: the copy was done, and the store knows its upload no more
            if isinstance(error, FileNotFoundError) and store.size(name) is None:
                raise
            settle(store, name)
            self._copying = False
            return False
        prove(store, name, self.bytes, end, self._temporary)
        self._copying = False
        return True

    def discard(self) -> None:
        """Deletes the temporary object, or ends its upload. One that the store may still copy stays."""
        self._buffer.clear()
        self._first_parts = None
        if self._copying:
            return
        if self._sent:
            with suppress(StoreError):
                self._store.delete(self._temporary)
        else:
            self._end()
