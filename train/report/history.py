"""What a run has written so far: its records, JSON lines in the order of their steps, and its newest checkpoint."""

import argparse
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import configs
from configs import ConfigError
from shards.format.atomic import open_file, parse_json
from shards.format.records import having, integer
from shards.places import local_path

from ..config import TrainConfig, run_folder

RECORD = having({"step": integer(0, 1 << 64)})


def forget_after(path: Path, step: int, check_lock: Callable[[], None] = lambda: None) -> None:
    """Drop the records of steps after `step`, which are from before a crash, and a last line that it cut off.

    Looks at the end of the file only: after a million steps it costs what it costs after ten. `check_lock` raises
    where what was read there may be another job's by now."""
    if not path.exists():
        return
    os.close(open_file(path))  # Unreadable for a pipe, which would wait for a reader
    if not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            end = lines.rfind(b"\n") + 1
            while end:
                start = lines.rfind(b"\n", 0, end - 1) + 1
                if step_of(lines[start:end], path) <= step:
                    break
                end = start
        check_lock()
        file.truncate(end)


def step_of(line: bytes, path: Path) -> int:
    """The step of a record; ConfigError where a line of the file is none."""
    try:
        record = parse_json(line)
        RECORD(record)
    except ValueError as error:
        raise ConfigError(
            f"{path}: found the line {line[:80]!r}, expected a record of a run ({error}). Restore the file, or move it "
            "away"
        ) from None
    step: int = record["step"]
    return step


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m train saved`."""
    parser.description = (
        "Print the newest checkpoint of a run and when it was written, in seconds since 1970, or "
        "`none`. slurm.sbatch compares what it prints before and after a run."
    )
    parser.add_argument("config", type=local_path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")


def run_saved(args: argparse.Namespace) -> int:
    """`python -m train saved`: print the newest checkpoint of a run and when it was written, in seconds since 1970. The
    line is another one after each save; its files are not looked into."""
    run = run_folder(configs.load(TrainConfig, args.config, args.overrides), args.config)
    manifests = sorted(run.glob("checkpoints/step-*/manifest.json"))
    print(
        f"{manifests[-1].parent} {manifests[-1].stat().st_mtime_ns / 1e9:.3f}"
        if manifests
        else "none"
    )
    return 0
