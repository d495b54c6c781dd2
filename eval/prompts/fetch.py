"""Prompt files from where they are published: complete, checked and under their names, or absent.

A file whose digest is known must have it. Of another one the digest is written down beside it when
it first comes (`fetched.json`), and from then on it must have that one. No library that is
installed resumes a download of any url and checks its digest, so `download` is of urllib.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from shards import atomic_write, canonical_json, sha256, sha256_file
from shards.console import Bar
from shards.format.atomic import read_json

from ..errors import BadPrompts, NotFetched
from .benchmarks import BENCHMARKS, PLACE, Benchmark
from .prompts import Json
from .published import Source

RECORD = "fetched.json"
TRIES = 6  # in a row that bring nothing
PAUSE = 0.5  # seconds before the second, then doubled
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be others a moment later

Show = Callable[[int, int | None], None]  # bytes on this machine, and in all where a server says so


def fetch(name: str, folder: Path = PLACE, say: Callable[[str], None] = print) -> None:
    """Brings a benchmark's files to `folder/name`; those that exist are checked and left.

    Raises NotFetched when a file does not come or has another digest, BadPrompts when it holds
    none.
    """
    benchmark = BENCHMARKS[name]
    if not benchmark.sources:
        raise BadPrompts(f"{name}: nothing to fetch; name a file of yours with --prompts")
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for source in benchmark.sources:
        path, record = home / source.file, read_record(home)
        expected = source.sha256 or record.get(source.file, {}).get("sha256")
        if path.exists():
            digest = sha256_file(path)
            if expected not in (digest, None):
                raise NotFetched(
                    f"{path}: found sha256 {digest}, expected {expected}: changed. Move it away, then fetch again"
                )
            note = "" if expected else ", not fetched by this program"
            say(f"{path}: there already, sha256 {digest}{note}")
            continue
        entry = _bring(name, benchmark, source, path, expected)
        atomic_write(home / RECORD, canonical_json(record | {source.file: entry}))
        os.replace(_unchecked(path), path)
        for part in home.glob(f".{path.name}.*.part"):  # of this version and of others
            part.unlink(missing_ok=True)
        trust = (
            "as expected" if source.sha256
            else "as the first time" if expected
            else f"trusted, as none is published; written down in {home / RECORD}"
        )  # fmt: skip
        say(
            f"{path}: {entry['bytes']:,} bytes, sha256 {entry['sha256']} ({trust}). Terms: {source.terms or 'unknown'}"
        )


def _bring(
    name: str, benchmark: Benchmark, source: Source, path: Path, expected: str | None
) -> Json:
    """Downloads a file to `_unchecked(path)` and checks it; returns its entry of fetched.json."""
    with Bar(f"fetch {source.file}", unit="bytes") as bar:
        count = 0

        def show(here: int, size: int | None) -> None:
            nonlocal count
            if size is not None:
                bar.begin(size)
            bar.advance(here - count)
            count = here

        part = download(source.url, path, show)
    unchecked = _unchecked(path)
    try:
        if source.make is None:
            os.replace(part, unchecked)
        else:
            unchecked.write_bytes(source.make(part))
        digest = sha256_file(unchecked)
        if expected not in (digest, None):
            origin = (
                "this program knows"
                if source.sha256
                else f"{path.with_name(RECORD)} has from the first time"
            )
            raise NotFetched(
                f"{source.url}: found sha256 {digest}, expected {expected}, which {origin}. It was changed where it is "
                "published, or on the way: compare before you trust it"
            )
        if source is benchmark.sources[0]:
            prompts = len(benchmark.read(unchecked).items)
            if benchmark.prompts not in (prompts, None):
                raise NotFetched(
                    f"{source.url}: found {prompts} prompts, expected the {benchmark.prompts} of {name}"
                )
    except BaseException:  # a wrong file would be taken for a complete one the next time
        part.unlink(missing_ok=True)
        unchecked.unlink(missing_ok=True)
        raise
    return {"sha256": digest, "bytes": unchecked.stat().st_size, "url": source.url}


def _unchecked(path: Path) -> Path:
    return path.with_name(f".{path.name}.unchecked")


def read_record(home: Path) -> Json:
    """Returns what was fetched to a folder before: {file: {"sha256", "bytes", "url"}}."""
    path = home / RECORD
    try:
        record = read_json(path)
        if all(isinstance(entry["sha256"], str) for entry in record.values()):
            return dict(record)
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise NotFetched(f"{path}: damaged. Move the folder away, then fetch again")


def download(url: str, path: Path, show: Show) -> Path:
    """Brings all of a url to a hidden file beside `path`; resumes where the server allows it.

    Returns that file. Raises NotFetched once several attempts in a row brought nothing.
    """
    failures, most, here = 0, 0, 0

    def count(size: int, total: int | None) -> None:
        nonlocal here
        here = size
        show(size, total)

    while True:
        here = 0
        try:
            return _attempt(url, path, count)
        except NotFetched:
            raise
        except HTTPError as error:
            reason = f"HTTP status {error.code}"
            if error.code not in PASSING:
                raise NotFetched(
                    f"{url}: {reason}. Has it moved? Bring it yourself and name it with --prompts"
                ) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise NotFetched(
                    f"{path.parent}: cannot be written to ({error.strerror}); see --to"
                ) from None
            reason = f"{type(error).__name__}: {error}"
        failures, most = (0 if here > most else failures + 1), max(most, here)
        if failures >= TRIES:
            raise NotFetched(
                f"{url}: did not come ({reason}). Check the network; run again to go on"
            )
        time.sleep(PAUSE * 2**failures)


def _attempt(url: str, path: Path, show: Show) -> Path:
    with ExitStack() as stack:
        answer = stack.enter_context(urlopen(Request(url), timeout=TIMEOUT))
        tag, length = answer.headers.get("ETag", ""), answer.headers.get("Content-Length")
        size = int(length) if length else None
        # named by the version, so that another one does not go on in it
        key = sha256(f"{url}\n{tag}\n{size}".encode())[:12]
        part = path.with_name(f".{path.name}.{key}.part")
        part.touch()
        file = stack.enter_context(part.open("r+b", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotFetched(f"{part}: another process fetches this file. Wait for it") from None
        resumable = tag.startswith('"') and answer.headers.get("Accept-Ranges") == "bytes"
        start = os.fstat(file.fileno()).st_size if resumable and size else 0
        if start and start == size:
            return part
        if size and 0 < start < size:
            answer.close()
            headers = {"Range": f"bytes={start}-", "If-Range": tag}
            answer = stack.enter_context(urlopen(Request(url, headers=headers), timeout=TIMEOUT))
            if answer.headers.get("ETag") != tag:
                raise ConnectionError("it was changed meanwhile")
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                start = 0
        else:
            start = 0
        file.truncate(start)
        file.seek(start)
        show(start, size)
        while chunk := answer.read(CHUNK):
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            show(file.tell(), size)
        if size not in (file.tell(), None):
            raise ConnectionError(f"{file.tell()} of {size} bytes came")
        os.fsync(file)
    return part
