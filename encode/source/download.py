"""The published sets of tars, from the Hugging Face hub into a folder.

    python -m encode download blip3o-long data/blip3o-long
    python -m encode download OWNER/NAME data/name --files 'train-*.tar' --threads 16 --sha256

The hub says what there is at one revision: names, sizes, digests. The bytes come by range
(`encode.source.fetch`): an interrupted download goes on inside a file, and a file has its name once it is
whole. Exit codes: 0 done, 2 the hub, the disk or a file is not as expected, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from shards.console import positive, size_text
from shards.errors import NoRoom
from shards.format.atomic import make_durable
from shards.places import local_path
from shards.printing import console

from ..errors import FetchFailed, HubError
from .fetch import LIMITS, Over, Remote, fill
from .hub import HubFile, hub_files
from .tars import expand

SETS = {
    "blip3o-long": "BLIP3o/BLIP3o-Pretrain-Long-Caption",
    "blip3o-short": "BLIP3o/BLIP3o-Pretrain-Short-Caption",
    "journeydb": "BLIP3o/BLIP3o-Pretrain-JourneyDB",
}
THREADS = 16  # requests at once
PER_FILE = 4  # of them, for one file
SPARE = 1 << 30  # bytes of the disk that are left free
DRAINED = 130
EVERY = 10.0  # seconds between lines where there is no terminal


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Download a set of tars from the Hugging Face hub; go on where it stopped."
    parser.add_argument("dataset", help=f"one of {', '.join(SETS)}, or OWNER/NAME")
    parser.add_argument("folder", type=local_path)
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument("--files", default="*.tar", metavar="PATTERN", help="which files (*.tar)")
    parser.add_argument(
        "--threads", type=positive, default=THREADS, help=f"requests at once ({THREADS})"
    )
    parser.add_argument("--endpoint", help="the hub's address (HF_ENDPOINT, or huggingface.co)")
    parser.add_argument("--sha256", action="store_true", help="check every file's digest as well")


def run_download(args: argparse.Namespace) -> int:
    """`python -m encode download`."""
    repository = SETS.get(args.dataset, args.dataset)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise HubError(
            f"{args.dataset!r} is no data set: expected OWNER/NAME or one of {', '.join(SETS)}"
        )
    commit, files = hub_files(repository, args.revision, args.files, args.endpoint)
    args.folder.mkdir(parents=True, exist_ok=True)
    lacking = [file for file in files if size_of(args.folder / file.path) != file.size]
    left = sum(file.size for file in lacking) - sum(parts_of(args.folder, lacking))
    free = shutil.disk_usage(args.folder).free
    print(
        f"{repository} at {commit[:12]}: {len(files):,} files of {size_text(sum(f.size for f in files))}; "
        f"{len(lacking):,} files, {size_text(left)}, to download; {size_text(free)} free at {args.folder}"
    )
    if left + min(SPARE, left) > free:
        raise NoRoom(
            f"{args.folder}: {size_text(left)} to download, {size_text(free)} free. Make room, choose another "
            "folder, or fewer files with --files"
        )
    try:
        with stoppable() as stop, Meter(sum(file.size for file in lacking)) as meter:
            bring_all(args.folder, lacking, args.threads, args.sha256, stop, meter)
            if args.sha256:
                standing = [file for file in files if file not in lacking]
                check_all(args.folder, standing, args.threads, stop)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", flush=True)
        os._exit(DRAINED)  # threads may wait for a server; what they brought is safe at any moment
    print(f"complete: {len(files):,} files in {args.folder}\n")
    print("\n".join(yaml_lines(args.dataset.rpartition("/")[2], args.folder, files)))
    return 0


# Files ---------------------------------------------------------------------------------------------


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def part_pattern(path: Path) -> str:
    """What the unfinished forms of a file are called, beside it."""
    return f".{glob.escape(path.name)}.*.part"


def parts_of(folder: Path, files: Sequence[HubFile]) -> Iterator[int]:
    """Bytes that earlier attempts brought of each file."""
    for file in files:
        path = folder / file.path
        found = (part.stat().st_blocks * 512 for part in path.parent.glob(part_pattern(path)))
        yield min(file.size, sum(found))


def bring_all(
    folder: Path, files: Sequence[HubFile], threads: int, digests: bool, stop: threading.Event,
    meter: Meter,
) -> None:  # fmt: skip
    """Download files, several at once; the first that fails ends it."""
    each = min(PER_FILE, threads)
    in_threads(
        [partial(bring, folder, file, each, digests, stop, meter) for file in files],
        max(1, threads // each), stop, meter.show,
    )  # fmt: skip


def bring(
    folder: Path, file: HubFile, threads: int, digests: bool, stop: threading.Event, meter: Meter
) -> None:
    """Download one file under a name of its own, then give it its name."""

    def report(amount: int) -> None:
        if stop.is_set():
            raise Over("stopped")
        meter.add(amount)

    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        remote = Remote(file.url, file.size, LIMITS)
        part = path.with_name(f".{path.name}.{remote.key}.part")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fill(handle, part, remote, threads, report, meter.had)
            if digests:
                check(part, file, path, stop)
            os.fsync(handle)
            os.replace(part, path)
            make_durable(path)
        except BlockingIOError:
            raise HubError(
                f"{part}: another process downloads this file. Wait for it, or end it"
            ) from None
        finally:
            os.close(handle)
    except FetchFailed as error:
        raise HubError(f"{error} What came stays: run again to go on") from None
    for old in path.parent.glob(part_pattern(path)):  # of another version
        old.unlink(missing_ok=True)


def check_all(folder: Path, files: Sequence[HubFile], threads: int, stop: threading.Event) -> None:
    """Digests of files that stood before; the first that is wrong ends it."""
    print(f"checking the digests of {len(files):,} files that were there already")
    jobs = [partial(check, folder / f.path, f, folder / f.path, stop) for f in files]
    in_threads(jobs, min(threads, os.cpu_count() or 1), stop)


def check(found: Path, file: HubFile, path: Path, stop: threading.Event) -> None:
    """Raise HubError, and take the file away, if its digest is not the hub's."""
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with found.open("rb") as data:
        while piece := data.read(1 << 22):
            if stop.is_set():
                raise Over("stopped")
            digest.update(piece)
    if digest.hexdigest() != file.sha256:
        found.unlink()
        raise HubError(
            f"{path}: found sha256 {digest.hexdigest()}, the hub says {file.sha256}. It has been "
            "removed: run again to fetch it anew"
        )


def in_threads(
    jobs: Sequence[Callable[[], None]], threads: int, stop: threading.Event,
    show: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Run jobs; on the first error stop the rest and raise it. A signal waits for none."""
    pool = ThreadPoolExecutor(threads)
    waiting: set[Future[None]] = {pool.submit(job) for job in jobs}
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            show()
    except Exception:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=not interrupted(), cancel_futures=True)


def interrupted() -> bool:
    """Whether a signal is on its way up."""
    return isinstance(sys.exc_info()[1], KeyboardInterrupt)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """SIGTERM as SIGINT; the event tells the threads."""
    stop = threading.Event()

    def handle(number: int, _: object) -> None:
        stop.set()
        raise KeyboardInterrupt

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """A bar with bytes, rate and ETA on a terminal; a line every ten seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self._console, self._total, self._came, self._had = console(), total, 0, 0
        self._lock, self._start, self._last = threading.Lock(), time.monotonic(), time.monotonic()
        self._bar = Bar(
            TextColumn("download"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("download", total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, completed=self._came)
        self._bar.stop()

    def add(self, amount: int) -> None:
        with self._lock:
            self._came += amount

    def had(self, amount: int) -> None:
        """Bytes that an earlier attempt brought; they say nothing of the rate."""
        self.add(amount)
        with self._lock:
            self._had += amount

    def show(self) -> None:
        now = time.monotonic()
        self._bar.update(self._task, completed=self._came)
        if not self._console.is_terminal and now - self._last >= EVERY:
            self._last = now
            rate = (self._came - self._had) / (now - self._start)
            left = f"{(self._total - self._came) / rate:.0f} s" if rate else "unknown"
            print(
                f"{size_text(self._came)} of {size_text(self._total)}, {size_text(rate)}/s, ETA {left}",
                flush=True,
            )


# What to use ---------------------------------------------------------------------------------------


def yaml_lines(name: str, folder: Path, files: Sequence[HubFile]) -> Iterator[str]:
    """The lines of an encode config that name the files as one source; of several, where folders
    repeat a name.
    """
    yield "sources:"
    groups: dict[str, list[str]] = {}
    bases = [file.path.rpartition("/")[2] for file in files]
    for file in files:
        parent = file.path.rpartition("/")[0] if len(set(bases)) < len(bases) else ""
        groups.setdefault(parent, []).append(file.path)
    for parent, paths in groups.items():
        places = [str(folder.absolute() / path) for path in paths]
        yield f"  {'-'.join(filter(None, [name.lower(), parent.replace('/', '-')]))}:"
        patterns = braces(places)
        for place in patterns if expand(patterns) == places else places:
            yield f'    - "{place}"'


def braces(places: Sequence[str]) -> list[str]:
    """Brace patterns that expand to these places, where numbers follow each other."""
    runs: list[tuple[str, str, str, str]] = []  # before, first number, last, after
    for place in places:
        found = re.fullmatch(r"(.*?)(\d*)([^/\d]*)", place)
        before, number, after = found.groups() if found else (place, "", "")
        if number and runs and (runs[-1][0], runs[-1][3]) == (before, after):
            last = runs[-1][2]
            padded = str(int(last) + 1).zfill(len(last) if runs[-1][1].startswith("0") else 0)
            if number == padded and (
                len(number) == len(last) or runs[-1][1] == str(int(runs[-1][1]))
            ):
                runs[-1] = before, runs[-1][1], number, after
                continue
        runs.append((before, number, number, after))
    return [
        f"{before}{first}{after}" if first == last else f"{before}{{{first}..{last}}}{after}"
        for before, first, last, after in runs
    ]
