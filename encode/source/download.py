"""The published sets of tars, from the Hugging Face hub into a folder.

    python -m encode download blip3o-long data/blip3o-long
    python -m encode download OWNER/NAME data/name --files 'train-*.tar' --threads 16 --sha256

An interrupted download goes on inside a file, and a file has its name once it is whole. Exit codes: 0
done, 2 the hub, the disk or a file is not as expected, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from itertools import groupby
from pathlib import Path

import yaml

from shards import NoRoom
from shards.console import Bar, counted, positive, say_next, size_text
from shards.places import local_path
from shards.signals import Stopped, stoppable

from ..errors import HubError
from .hub import HubFile, check_digest, download_file, hub_files, remove_stale_parts
from .places import expand

SETS = {
    "blip3o-long": "BLIP3o/BLIP3o-Pretrain-Long-Caption",
    "blip3o-short": "BLIP3o/BLIP3o-Pretrain-Short-Caption",
    "journeydb": "BLIP3o/BLIP3o-Pretrain-JourneyDB",
}
THREADS = 16
MOST_NAMED = 8  # places that the next command names
SPARE = 1 << 30  # bytes of the disk that are left free


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Download a set of tars from the Hugging Face hub; go on where it stopped."
    parser.add_argument("dataset", help=f"one of {', '.join(SETS)}, or OWNER/NAME")
    parser.add_argument("folder", type=local_path, help="where its files go")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument("--files", default="*.tar", metavar="PATTERN", help="which files (*.tar)")
    parser.add_argument(
        "--threads", type=positive, default=THREADS, help=f"files at once ({THREADS})"
    )
    parser.add_argument("--endpoint", help="the hub's address (HF_ENDPOINT, or huggingface.co)")
    parser.add_argument("--sha256", action="store_true", help="check every file's digest as well")


def run_download(args: argparse.Namespace) -> int:
    """Runs `python -m encode download`; returns the exit code."""
    if code := stoppable(lambda: _download(args)):
        os._exit(code)  # threads may wait for a server; the bytes they wrote are safe at any moment
    return 0


def _download(args: argparse.Namespace) -> int:
    repository = SETS.get(args.dataset, args.dataset)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise HubError(
            f"{args.dataset!r} is no data set: expected OWNER/NAME or one of {', '.join(SETS)}"
        )
    folder: Path = args.folder
    commit, files = hub_files(repository, args.revision, args.files, args.endpoint)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(files, folder)
    missing = [file for file in files if _size(folder / file.path) != file.size]
    total = sum(file.size for file in missing)
    partial_bytes = sum(_size(file.part(folder)) or 0 for file in missing)
    remaining, free = total - partial_bytes, shutil.disk_usage(folder).free
    print(
        f"{repository} at {commit[:12]}: {counted(len(files), 'file')} of "
        f"{size_text(sum(file.size for file in files))}; {counted(len(missing), 'file')}, "
        f"{size_text(remaining)}, to download; {size_text(free)} free at {folder}",
        flush=True,
    )
    if remaining + min(SPARE, remaining) > free:
        raise NoRoom(
            f"{folder}: {size_text(remaining)} to download, {size_text(free)} free. Make room, choose "
            "another folder, or fewer files with --files"
        )
    stop = threading.Event()
    with Bar("download", total, "bytes") as bar:
        bar.skip(partial_bytes)
        jobs = [partial(download_file, f, folder, args.sha256, stop, bar.advance) for f in missing]
        if args.sha256:
            present = [file for file in files if file not in missing]
            print(f"checking the digests of {counted(len(present), 'file')} here already")
            jobs += [
                partial(check_digest, folder / f.path, f, folder / f.path, stop) for f in present
            ]
        _run_all(jobs, args.threads, stop)
    print(f"complete: {counted(len(files), 'file')} in {folder}\n")
    sources = sources_of(args.dataset.rpartition("/")[2], folder, files)
    lines = yaml.safe_dump({"sources": sources}, sort_keys=False, width=10_000, allow_unicode=True)
    print(lines, end="", flush=True)
    words = [f"{name}={place}" for name, places in sources.items() for place in places]
    models = ("--vae", "flux", "--text", "gemma-2b")
    note = "or models of your own"
    if len(words) <= MOST_NAMED:
        say_next("encode", "init", "--sources", *words, *models, note=note, file=sys.stderr)
    return 0


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _run_all(jobs: Sequence[Callable[[], None]], threads: int, stop: threading.Event) -> None:
    """Runs jobs in threads; the first error, or a signal, stops the rest and is raised."""
    pool = ThreadPoolExecutor(threads)
    try:
        futures, _ = wait([pool.submit(job) for job in jobs], return_when=FIRST_EXCEPTION)
        for future in futures:
            future.result()
    except Stopped:
        stop.set()
        raise
    except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise


def sources_of(name: str, folder: Path, files: Sequence[HubFile]) -> dict[str, list[str]]:
    """Returns the places of one source of an encode config, by its name; of several, where folders
    repeat a name.
    """
    bases = [file.path.rpartition("/")[2] for file in files]
    groups: dict[str, list[str]] = {}
    for file in files:
        parent = file.path.rpartition("/")[0] if len(set(bases)) < len(bases) else ""
        key = "-".join(filter(None, [name.lower(), parent.replace("/", "-")]))
        groups.setdefault(key, []).append(str(folder.absolute() / file.path))
    return {
        key: patterns if expand(patterns := brace_patterns(places)) == places else places
        for key, places in groups.items()
    }


def brace_patterns(places: Sequence[str]) -> list[str]:
    """Returns brace patterns that expand to these places, one for each run of numbers of one width."""

    def run(item: tuple[int, tuple[str, ...]]) -> tuple[object, ...]:
        index, (stem, number, suffix) = item
        return stem, suffix, len(number), int(number or 0) - index

    matches = [re.fullmatch(r"(.*?)(\d*)([^/\d]*)", place) for place in places]
    parts = [m.groups() if m else (place, "", "") for m, place in zip(matches, places, strict=True)]
    patterns = []
    for _, group in groupby(enumerate(parts), run):
        (stem, first, suffix), *following = [item for _, item in group]
        number = f"{{{first}..{following[-1][1]}}}" if following else first
        patterns.append(f"{stem}{number}{suffix}")
    return patterns
