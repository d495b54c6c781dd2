"""The lines of a run's metrics.jsonl: what they hold, how they are read, and how a run that goes on
from an earlier step takes back those after it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from configs import ConfigError
from shards.format.atomic import LINES_BYTES, open_file, parse_json, read_file
from shards.format.checks import Count, Fields, check

Figure = float | None  # null where it was not finite
Levels = Annotated[list[Figure], Field(min_length=8, max_length=8)] | None


class _Start(Fields):
    mix: dict[str, float] = {}
    epoch_samples: Count = 0
    parameters: dict[str, Count] = {}
    world: Annotated[int, Field(ge=1)] = 1
    device: str = ""
    shift: float | None = None  # of the noise levels; None: of a run of before, whose shift is 3
    prediction: str = "velocity"
    image_tokens: Count = 0  # 0: of a run of before, which does not say it
    token_values: Count = 0
    positions: str = ""
    commit: str | None = None  # of the code


class _Validation(Fields):
    loss: Figure = None
    normalised: Figure = None
    initial_share: Figure = None
    levels: Levels = None
    over_reference: Figure = None
    levels_over_reference: Levels = None


class _Step(Fields):
    step: Count


class _Record(_Step):
    position: Count = 0
    loss: Figure = None
    loss_by_level: Levels = None
    grad_norm: Figure = None
    mfu: Figure = None
    data_wait: Figure = None
    samples_per_second: Figure = None
    epoch: Figure = None
    initial_share: Figure = None
    not_finite: Count = 0
    start: _Start | None = None
    validation: _Validation | None = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file of JSON lines, none where there is no file; a last line without
    an end, which is being written, is left out. ConfigError where a line is no record of a run.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        for line in read_file(path, LINES_BYTES).split(b"\n")[:-1]:
            record = parse_json(line)
            check(_Record, record)
            records.append(record)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: line {len(records) + 1} is no record of a run: {error}. Restore the file, or move "
            "it away"
        ) from None
    return records


def forget_after(path: Path, step: int, check_lock: Callable[[], None] = lambda: None) -> None:
    """Cuts off the records of steps after `step`, which are from before a crash, and a last line
    without an end.

    Reads the file from its end, so its length costs nothing. `check_lock` raises where the file may
    be another job's by now.
    """
    if not path.exists():
        return
    os.close(open_file(path))  # Unreadable for a pipe, which would wait for a reader
    if not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            kept = (end for end, record in _last_records(lines, path) if record["step"] <= step)
            end = next(kept, 0)
        check_lock()
        file.truncate(end)


def validated(path: Path, step: int) -> bool:
    """Whether the last step of the file is `step` and its validation is there; reads as `forget_after`."""
    if not path.exists() or not path.stat().st_size:
        return False
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines,
    ):
        last = takewhile(
            lambda record: record["step"] == step, (r for _, r in _last_records(lines, path))
        )
        return any("validation" in record for record in last)


def _last_records(lines: mmap.mmap, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields where each whole line ends and its record, the last one first."""
    end = lines.rfind(b"\n") + 1
    while end:
        start = lines.rfind(b"\n", 0, end - 1) + 1
        yield end, _record_of(lines[start:end], path)
        end = start


def _record_of(line: bytes, path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = parse_json(line)
        check(_Step, record)
        return record
    except ValueError as error:
        raise ConfigError(
            f"{path}: found the line {line[:80]!r}, expected a record of a run ({error}). "
            "Restore the file, or move it away"
        ) from None
