"""Columns in an object store: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix.

Small objects are created on the condition that there is none. Large ones are uploaded in parts
under a `.tmp-` name beside their own, then copied to it on that same condition, and the temporary
one is deleted. A store that ignores the condition would lose data silently, so each is put to the
test before the first object is created. Reads go through `pages.Pages`.

An upload that is killed leaves a `.tmp-` object, or parts that no listing shows: give the bucket a
lifecycle rule that ends unfinished multipart uploads after some days.
"""

from __future__ import annotations

import copy
import os
import re
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import NotAColumn, StoreError
from ..format.atomic import TEMPORARY, WHOLE_BYTES
from ..places import local_path
from ..printing import redacted
from .base import Committed, Handle, Store, too_large
from .client import Client, Limits, TruncatedBody
from .page_cache import PageCache
from .pages import PAGE, THREADS, Pages
from .proof import END, prove, read_end
from .ranges import Ranges
from .remote_object import RemoteObject
from .upload import PART, Upload

CACHE_GB = 64
LISTED = 256  # more objects than these are looked up by listing their folders


class RemoteStore(Store):
    """A prefix of a bucket. Handles are `RemoteObject`; copies in other processes connect anew.

    `cache` (a folder) and `cache_bytes` are taken from LATENTBANK_CACHE and LATENTBANK_CACHE_GB
    where they are not given.
    """

    conditional = True  # a request may say of which version the object must be

    def __init__(
        self, url: str, limits: Limits | None = None,
        cache: Path | None = None, cache_bytes: int | None = None, page_bytes: int = PAGE,
    ) -> None:  # fmt: skip
        scheme, _, path = url.partition("://")
        path = path.rstrip("/")
        bucket, _, self._prefix = path.partition("/")
        if (
            not bucket
            or {"?", "#"} & set(path)
            or re.search(r"@|:(?!\d*$)", bucket)  # a server's port is none
            or {"", ".", ".."} & set(path.split("/"))
            or re.search(r"[\x00-\x1f\x7f]", path)
        ):
            raise StoreError(
                f"{redacted(url)}: expected {scheme}://<bucket>/<path> without empty parts, `.`, `..`, `?`, "
                "`#`, tabs, line ends, or a user or password"
            )
        self._client = Client(f"{scheme}://{bucket}", limits or Limits())
        self._cache, self._cache_bytes, self.page_bytes = cache, cache_bytes, page_bytes
        self.url = f"{scheme}://{path}"
        self._opened: tuple[int, Pages] | None = None  # by which process

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _below(self, prefix: str) -> RemoteStore:
        """Returns the store of another prefix in the same bucket, with the same connections."""
        store = copy.copy(self)
        store._prefix = prefix
        store.url = f"{self._client.root}/{prefix}" if prefix else self._client.root
        return store

    def child(self, name: str) -> RemoteStore:
        return self._below(self.key(name))

    @property
    def parent(self) -> RemoteStore:
        if not self._prefix:
            raise NotAColumn(f"{self.url}: a whole bucket; nothing is above it")
        return self._below(self._prefix.rpartition("/")[0])

    def key(self, name: str) -> str:
        """Returns a name as the bucket knows it."""
        return "/".join(part for part in (self._prefix, name) if part)

    def call(self, work: str, name: str, action: Any, **options: Any) -> Any:
        """Calls `Client.call` for an object, or for the whole store."""
        return self._client.call(work, self.at(name) if name else self.url, action, **options)

    # Whole objects --------------------------------------------------------------------------------

    def read(self, name: str, most: int = WHOLE_BYTES) -> bytes:
        def get(library: Any, store: Any) -> bytes | RemoteObject:
            answer = library.get(store, self.key(name))
            size = answer.meta["size"]
            if size > most:
                raise too_large(self.at(name), size, most)
            if size > PART:  # rather in pieces, of which each may be repeated
                return RemoteObject(self, name, size, answer.meta["e_tag"])
            data = bytes(answer.bytes())
            if len(data) != size:
                raise TruncatedBody(f"{len(data)} bytes came, the object has {size}")
            return data

        data = self.call("reading", name, get)
        if isinstance(data, bytes):
            return data
        pieces = range(0, data.size, PART)
        return b"".join(data.fetch(start, min(PART, data.size - start)) for start in pieces)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Creates a small object; False if the name is taken, and then the other stays.

        Where the store's answer is lost, the repetition finds the object that the first attempt
        made: False, though it is ours. A caller treats an object as its own if it says the same.
        """
        self._require("create")
        try:
            self._create(name, data)
        except FileExistsError:
            return False
        return True

    def _create(self, name: str, data: bytes) -> None:
        data = bytes(data)  # obstore does not copy, and a buffer may change under it
        self.call(
            "creating", name,
            lambda library, store: library.put(
                store, self.key(name), data, mode="create", use_multipart=False
            ),
        )  # fmt: skip

    def _copy_new(self, name: str, to: str) -> None:
        self.call(
            "copying", to,
            lambda library, store: library.copy(
                store, self.key(name), self.key(to), overwrite=False
            ),
            kind="copy",
        )  # fmt: skip

    def _require(self, condition: str) -> None:
        """Tests once that the store refuses to `create` over, or to `copy` onto, what exists."""
        if condition in self._client.conditions:
            return
        first, second = (f"{TEMPORARY}{secrets.token_hex(8)}" for _ in range(2))
        self.replace(first, b"?")
        try:
            if condition == "create":
                self._create(first, b"!")
            else:
                self.replace(second, b"!")
                self._copy_new(first, second)
        except FileExistsError:
            self._client.conditions.add(condition)
        finally:
            for name in (first, second):
                with suppress(StoreError):  # without permission to delete it stays as a temporary
                    self.delete(name)
        if condition not in self._client.conditions:
            raise StoreError(
                f"{self._client.root}: this store replaces what exists though it is asked to "
                f"{condition} only where nothing is, so two writers could destroy each other's "
                "data. Write to another store, or to a folder, and copy the finished column"
            )

    def replace(self, name: str, data: bytes) -> None:
        data = bytes(data)
        self.call(
            "writing", name,
            lambda library, store: library.put(store, self.key(name), data, use_multipart=False),
        )  # fmt: skip

    def staged(self, name: str) -> Upload:
        return Upload(self, name)

    # Names ----------------------------------------------------------------------------------------

    def _head(self, name: str) -> dict[str, Any]:
        meta: dict[str, Any] = self.call(
            "looking up", name, lambda library, store: library.head(store, self.key(name))
        )
        return meta

    def size(self, name: str) -> int | None:
        try:
            return int(self._head(name)["size"])
        except FileNotFoundError:
            return None

    def sizes(self, names: Sequence[str]) -> Sequence[int | None]:
        if len(names) > LISTED:
            folders = {name.rpartition("/")[0].partition("/")[0] for name in names}
            sizes = dict(item for folder in folders for item in self.list(folder))
            return [sizes.get(name) for name in names]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.size, names))

    def folders(self) -> Sequence[str]:
        prefixes: Sequence[str] = self.call(
            "listing", "",
            lambda library, store: library.list_with_delimiter(
                store, f"{self._prefix}/" if self._prefix else None
            )["common_prefixes"],
            kind="list",
        )  # fmt: skip
        return sorted(path.rstrip("/").rpartition("/")[2] for path in prefixes)

    def _objects(self, prefix: str) -> list[dict[str, Any]]:
        """Returns what the store knows of every object below a folder, sorted, each with its `name`
        here. Empty objects that other tools put in the place of folders are left out.
        """
        folder = self.key(prefix)
        items: list[dict[str, Any]] = self.call(
            "listing", prefix,
            lambda library, store: [
                dict(item)
                for page in library.list(store, folder or None, chunk_size=1000)
                for item in page
                if item["path"].startswith(f"{folder}/" if folder else "")
                and not item["path"].endswith("/")
            ],
            kind="list",
        )  # fmt: skip
        skip = len(self._prefix) + 1 if self._prefix else 0
        for item in items:
            item["name"] = item["path"][skip:]
        return sorted(items, key=lambda item: str(item["name"]))

    def age(self, name: str) -> float | None:
        try:
            return time.time() - float(self._head(name)["last_modified"].timestamp())
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return [
            (item["name"], item["size"])
            for item in self._objects(prefix.rstrip("/"))
            if not is_temporary(item["name"])
        ]

    def stale_temporaries(self, seconds: float) -> Sequence[str]:
        """Returns the names that interrupted writers left behind at least so long ago. The parts of
        uploads that never ended are not among them: a lifecycle rule of the bucket removes those.
        """
        old = time.time() - seconds
        return [
            item["name"]
            for item in self._objects("")
            if is_temporary(item["name"]) and item["last_modified"].timestamp() <= old
        ]

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.call(
                "deleting", name, lambda library, store: library.delete(store, self.key(name))
            )

    def move(self, name: str, to: str) -> None:
        """Gives an object another name. Not at once: for a moment it has both."""
        size = int(self._head(name)["size"])
        end = read_end(self, name, size, min(size, END)) if size else b""
        self.call(
            "copying", name,
            lambda library, store: library.copy(store, self.key(name), self.key(to)),
            kind="copy",
        )  # fmt: skip
        prove(self, to, size, end, name)
        self.delete(name)

    # Reading in place -----------------------------------------------------------------------------

    @property
    def _pages(self) -> Pages:
        """Returns those of this process, shared by all stores with the same cache."""
        if self._opened is not None and self._opened[0] == os.getpid():
            return self._opened[1]
        folder, limit = self._cache or cache_folder(), self._cache_bytes
        limit = cache_limit() if limit is None else limit
        key = (os.getpid(), folder, limit, self.page_bytes)
        pages = _PAGES.get(key)
        if pages is None:
            pages = _PAGES.setdefault(key, Pages(PageCache(folder, limit), self.page_bytes))
        self._opened = (os.getpid(), pages)
        return pages

    @property
    def _ranges(self) -> Ranges:
        """Returns those of this process."""
        ranges = _RANGES.get(os.getpid())
        return ranges if ranges is not None else _RANGES.setdefault(os.getpid(), Ranges())

    def expect(self, reader: object, size: int) -> None:
        self._pages.expect(reader, size)

    @property
    def keeps(self) -> bool:
        return self._pages.fits

    @property
    def fetches(self) -> int:
        return self._pages.fetches

    @property
    def way(self) -> str:
        pages = self._pages
        gigabytes = f"{pages.cache.limit / 1e9:g} GB"
        if pages.fits:
            return f"in pages, kept in {pages.cache.folder} (LATENTBANK_CACHE_GB: {gigabytes})"
        if not pages.cache.limit:
            return "row by row, without a cache (LATENTBANK_CACHE_GB: 0)"
        return (
            f"row by row, for the cache cannot hold all columns (LATENTBANK_CACHE_GB: {gigabytes})"
        )

    def open(self, name: str, cached: bool = True, committed: Committed | None = None) -> Handle:
        if committed is not None:
            size, digest = committed
            return RemoteObject(self, name, size, None, cached, digest)
        head = self._head(name)
        return RemoteObject(self, name, head["size"], head["e_tag"], cached)

    def length(self, handle: Handle, name: str) -> int:
        return int(handle.size)

    def preadv(self, handle: Handle, buffers: Sequence[memoryview], offset: int) -> int:
        pages = self._pages
        if handle.cached and pages.room >= handle.beside:
            return pages.preadv(handle, buffers, offset)
        if handle.cached:
            handle.anew = True  # also once pages are kept, which it has not seen before
            return self._ranges.preadv(handle, buffers, offset)
        return pages.straight(handle, buffers, offset)

    def read_apart(self, handle: Handle, buffers: Sequence[memoryview], offset: int) -> int:
        read = self._pages.read_apart if handle.cached else self._pages.straight
        return read(handle, buffers, offset)

    def willneed(self, handle: Handle, offset: int, length: int, wanted: int = 0) -> None:
        if not handle.cached:
            return
        if self._pages.room >= handle.beside:
            self._pages.willneed(handle, offset, length)
        else:
            self._ranges.willneed(handle, offset, length, wanted)

    def came_anew(self, handle: Handle) -> bool:
        pages = self._pages
        return not handle.cached or pages.room < handle.beside or pages.take_anew(handle)

    def forget(self, handle: Handle, offset: int, length: int) -> bool:
        self._ranges.forget(handle)
        self._pages.forget(handle, offset, length)
        return True

    def close(self, handle: Handle) -> None:
        self._ranges.forget(handle)
        self._pages.cancel(handle)


_RANGES: dict[int, Ranges] = {}
_PAGES: dict[tuple[int, Path, int, int], Pages] = {}


def cache_folder() -> Path:
    """Returns where pages are kept: LATENTBANK_CACHE, or a folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder: Path = local_path(os.environ.get("LATENTBANK_CACHE") or Path(cache) / "latentbank")
    return folder


def cache_limit() -> int:
    """Returns the bytes of pages that are kept at most, from LATENTBANK_CACHE_GB; 0: none are."""
    gigabytes = os.environ.get("LATENTBANK_CACHE_GB") or CACHE_GB
    try:
        if (limit := int(float(gigabytes) * 1e9)) >= 0:
            return limit
        raise ValueError(limit)
    except (ValueError, OverflowError):
        raise StoreError(
            f"LATENTBANK_CACHE_GB: found {gigabytes!r}, expected a number of gigabytes, 0 for no cache"
        ) from None


def is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)
