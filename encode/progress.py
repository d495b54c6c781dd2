"""A bar with rows, rate and ETA on a terminal; a line every ten seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .engine import ShardResult

EVERY = 10.0


class Progress:
    """Progress over shards; `with Progress(shards) as bar`."""

    def __init__(self, shards: int) -> None:
        self._console = Console()
        self._bar = Bar(
            TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("encode", total=shards, rate="")
        self._start = self._last = time.monotonic()
        self._shards, self._done, self._rows = shards, 0, 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def shard_done(self, name: str, result: ShardResult) -> None:
        self._done += 1
        self._bar.advance(self._task)
        if result.note:
            self.note(f"{name}: {result.note}; {result.rows} rows kept")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def rows(self, rows: int) -> None:
        """Rows written so far by this run."""
        self._rows = rows
        passed = time.monotonic() - self._start
        rate = f"{rows / passed:.0f} rows/s" if passed else ""
        self._bar.update(self._task, rate=rate)
        if not self._console.is_terminal and time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            left = passed / self._done * (self._shards - self._done) if self._done else 0.0
            eta = f"ETA {left:.0f} s" if self._done else "ETA unknown"
            self.note(f"encode {self._done}/{self._shards} shards, {rows:,} rows, {rate}, {eta}")
