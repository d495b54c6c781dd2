"""Prompt files from where they are published: whole, checked and under their names, or not there at all.

A file whose digest is known has to have it. Of another one the digest is written down beside it when it first comes
(`fetched.json`), and from then on it has to have that one.
"""

import errno
import fcntl
import http.client
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from shards import atomic_write, canonical_json, sha256, sha256_file
from shards.format.atomic import read_json
from shards.printing import console, one_line

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

Show = Callable[[int, int | None], None]  # bytes that are here, and in all where a server says so


def fetch(name: str, folder: Path = PLACE, say: Callable[[str], None] = print) -> None:
    """Bring a benchmark's files to `folder/name`. What is there already is checked and left.

    Raises NotFetched when a file does not come or is not the one it should be, BadPrompts when it holds none.
    """
    benchmark = BENCHMARKS[name]
    if not benchmark.sources:
        raise BadPrompts(f"{name}: nothing to fetch; name a file of yours with --prompts")
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for source in benchmark.sources:
        _bring_checked(name, benchmark, source, home, say)


def _bring_checked(
    name: str, benchmark: Benchmark, source: Source, home: Path, say: Callable[[str], None]
) -> None:
    path, record = home / source.file, read_record(home)
    known = source.sha256 or record.get(source.file, {}).get("sha256")
    if path.exists():
        found = sha256_file(path)
        if known not in (found, None):
            raise NotFetched(
                f"{path}: found sha256 {found}, expected {known}: it was changed. Move it away, then fetch again"
            )
        say(
            f"{path}: there already, sha256 {found}"
            + ("" if known else ", not fetched by this program")
        )
        return
    with _bar(source.file) as show:
        came = download(source.url, path, show)
    made = came if source.make is None else path.with_name(f".{path.name}.made")
    with _removing(came, made):  # what is no good would be taken for whole the next time
        if source.make is not None:
            made.write_bytes(source.make(came))
        found = sha256_file(made)
        if known not in (found, None):
            whose = (
                "this program knows"
                if source.sha256
                else f"{home / RECORD} has from the first time"
            )
            raise NotFetched(
                f"{source.url}: found sha256 {found}, expected {known}, which {whose}. It was changed where it is "
                "published, or on the way: compare before you trust it"
            )
        if source is benchmark.sources[0]:
            count = len(benchmark.read(made).items)
            if benchmark.prompts not in (count, None):
                raise NotFetched(
                    f"{source.url}: found {count} prompts, expected the {benchmark.prompts} of {name}"
                )
    told = {"sha256": found, "bytes": made.stat().st_size, "url": source.url}
    atomic_write(home / RECORD, canonical_json(record | {source.file: told}))
    os.replace(made, path)
    for left in (came, *home.glob(f".{path.name}.*.part")):  # parts of other versions too
        left.unlink(missing_ok=True)
    trust = (
        "as expected" if source.sha256
        else "as the first time" if known
        else f"trusted, as none is published; written down in {home / RECORD}"
    )  # fmt: skip
    say(
        f"{path}: {told['bytes']:,} bytes, sha256 {found} ({trust}). Terms: {source.terms or 'unknown'}"
    )


@contextmanager
def _removing(*paths: Path) -> Iterator[None]:
    """Take files away if what is done with them fails."""
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def read_record(home: Path) -> Json:
    """What was fetched to a folder before: {file: {"sha256", "bytes", "url"}}."""
    path = home / RECORD
    try:
        found = read_json(path)
        if all(isinstance(entry["sha256"], str) for entry in found.values()):
            return dict(found)
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise NotFetched(f"{path}: damaged. Move the folder away, then fetch again")


# One file ------------------------------------------------------------------------------------------


def download(url: str, path: Path, show: Show) -> Path:
    """What a url gives, whole, in a hidden file beside `path`; what came before is kept where the server allows it.

    Raises NotFetched once several attempts in a row brought nothing.
    """
    failed, had = 0, 0
    while True:
        here: list[int] = [0]
        try:
            return _attempt(url, path, show, here)
        except HTTPError as error:
            reason = f"HTTP status {error.code}"
            if error.code not in PASSING:
                raise NotFetched(
                    f"{url}: {reason}. Has it moved? Bring it yourself and name it with --prompts"
                ) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, NotFetched):
                raise
            if isinstance(error, OSError) and error.errno in DISK:
                raise NotFetched(
                    f"{path.parent}: cannot be written to ({error.strerror}); see --to"
                ) from None
            reason = f"{type(error).__name__}: {error}"
        failed, had = (0 if here[0] > had else failed + 1), max(had, here[0])
        if failed >= TRIES:
            raise NotFetched(
                f"{url}: did not come ({reason}). Check the network; run again to go on"
            )
        time.sleep(PAUSE * 2**failed)


def _attempt(url: str, path: Path, show: Show, here: list[int]) -> Path:
    with urlopen(Request(url), timeout=TIMEOUT) as answer:
        tag, size = answer.headers.get("ETag", ""), _size(answer)
        key = sha256(f"{url}\n{tag}\n{size}".encode())[:12]  # another version does not go on here
        part = path.with_name(f".{path.name}.{key}.part")
        with _locked(part) as file:
            have = here[0] = os.fstat(file).st_size
            resumable = tag.startswith('"') and answer.headers.get("Accept-Ranges") == "bytes"
            if resumable and have and have == size:
                return part
            if resumable and 0 < have < (size or 0):
                answer.close()
                asked = Request(url, headers={"Range": f"bytes={have}-", "If-Range": tag})
                with urlopen(asked, timeout=TIMEOUT) as rest:
                    if rest.headers.get("ETag") != tag:
                        raise ConnectionError("it was changed meanwhile")
                    goes_on = rest.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                    _pour(rest, file, have if goes_on else 0, size, show, here)
            else:
                _pour(answer, file, 0, size, show, here)
            os.fsync(file)
    return part


def _size(answer: Any) -> int | None:
    length = answer.headers.get("Content-Length")
    return int(length) if length else None


def _pour(answer: Any, file: int, at: int, size: int | None, show: Show, here: list[int]) -> None:
    os.ftruncate(file, at)
    os.lseek(file, at, os.SEEK_SET)
    here[0] = at
    while chunk := answer.read(CHUNK):
        view = memoryview(chunk)
        while view:
            view = view[os.write(file, view) :]
        here[0] += len(chunk)
        show(here[0], size)
    if size not in (here[0], None):
        raise ConnectionError(f"{here[0]} of {size} bytes came")


@contextmanager
def _locked(part: Path) -> Iterator[int]:
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    except BlockingIOError:
        raise NotFetched(f"{part}: another process fetches this file. Wait for it") from None
    finally:
        os.close(file)


@contextmanager
def _bar(name: str) -> Iterator[Show]:
    """Bytes, and of how many; time left."""
    columns = (
        TextColumn("fetch {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(one_line(name), total=None)
        yield lambda here, size: bar.update(task, completed=here, total=size)
