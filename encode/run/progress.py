"""How a run goes: a bar on a terminal, a line every half minute elsewhere, and for everybody else
`<root>/progress.json`, replaced every few seconds.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from shards import Store
from shards.console import duration_text
from shards.format.atomic import Json, canonical_json
from shards.printing import console, one_line

from ..meter import WAITS, Seconds, Stats, none_spent
from .scheduler import Scheduler
from .tasks import ShardResult, ShardTask

log = logging.getLogger(__name__)
PROGRESS, FORMAT = "progress.json", "latentbank-progress"
LINE_SECONDS, FILE_SECONDS, BAR_SECONDS = 30.0, 5.0, 0.5
WINDOW = 60.0  # seconds that the rates shown at the moment are of
BUSY = 0.9  # share of the time; below it the reason is said
REASONS = {"decode": "decoding", "read": "tars", "write": "the disk", "idle": "shards"}


@dataclass(slots=True)
class Totals:
    """Seconds of all workers of a run, also of those that have died."""

    busy: float = 0.0
    waits: Seconds = field(default_factory=none_spent)
    seconds: Seconds = field(default_factory=none_spent)
    cpu: Seconds = field(default_factory=none_spent)

    def add(self, new: Stats, old: Stats | None) -> None:
        """What a worker did between two pictures of it."""
        self.busy += new.busy - (old.busy if old else 0.0)
        for mine, now, before in (
            (self.waits, new.waits, old.waits if old else {}),
            (self.seconds, new.seconds, old.seconds if old else {}),
            (self.cpu, new.cpu, old.cpu if old else {}),
        ):
            for name, value in now.items():
                mine[name] += value - before.get(name, 0.0)

    def share(self, since: Totals | None = None) -> float | None:
        """Of the workers' time in which an encoder ran."""
        busy = self.busy - (since.busy if since else 0.0)
        waits = sum(self.waits.values()) - (sum(since.waits.values()) if since else 0.0)
        return busy / (busy + waits) if busy + waits > 0 else None

    def reason(self, since: Totals | None = None) -> str:
        """What was waited for most."""
        gone = since.waits if since else none_spent()
        return max(WAITS, key=lambda name: self.waits[name] - gone[name])

    def copy(self) -> Totals:
        return Totals(self.busy, self.waits.copy())


class Progress:
    """Progress over shards; `with Progress(root, tasks) as progress`."""

    def __init__(self, root: Store, tasks: Sequence[ShardTask]) -> None:
        self._root, self._tasks = root, tasks
        self._console = console()
        self._bar = Bar(
            TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("encode", total=len(tasks), text="")
        self._began, self._started = time.monotonic(), time.time()
        self._line = self._file = self._drawn = self._began
        self._bytes_left = sum(task.size for task in tasks)
        self._bytes_done = self._rows_done = self._done = 0
        self._scheduler: Scheduler[int] | None = None
        self._stats: dict[int, Stats] = {}
        self._totals = Totals()
        self._columns: dict[str, Counter[str]] = {}
        self._past: deque[tuple[float, int, Totals]] = deque([(self._began, 0, Totals())])

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._scheduler is not None:
            self.write(final=True)

    def note(self, text: str) -> None:
        """A line that stays. Where it goes may be full, as the target may be: the run goes on."""
        with suppress(OSError):
            self._console.print(one_line(text), soft_wrap=True)

    def shard_done(self, key: int, result: ShardResult) -> None:
        """A shard is committed."""
        task = self._tasks[key]
        self._done += 1
        self._bytes_done += task.size
        self._rows_done += result.rows
        for name, target in task.targets.items():
            column = self._columns.setdefault(target.store.url, Counter())
            column["shards"] += 1
            column["rows"] += sum(result.counts.get(name, {}).values())
        self._bar.advance(self._task)
        if result.note:
            self.note(f"{task.name}: {result.note}; {result.rows} rows kept")

    def gone(self, worker: int) -> None:
        """A worker has died; another one in its place counts from nothing."""
        self._stats.pop(worker, None)

    def update(
        self, scheduler: Scheduler[int], stats: Mapping[int, Stats], at_once: bool = False
    ) -> None:
        """The state of things; looked at, drawn, printed and written when it is time to."""
        self._scheduler = scheduler
        now = time.monotonic()
        if now - self._drawn < BAR_SECONDS and not at_once:
            return
        self._drawn = now
        for worker, new in stats.items():
            old = self._stats.get(worker)
            self._totals.add(new, old if old and old.pid == new.pid else None)
        self._stats = dict(stats)
        self._past.append((now, self.rows, self._totals.copy()))
        while now - self._past[0][0] > WINDOW:
            self._past.popleft()
        self._bar.update(self._task, text=self._text())
        if not self._console.is_terminal and now - self._line >= LINE_SECONDS:
            self._line = now
            self.note(f"encode {self._done}/{len(self._tasks)} shards, {self._text()}")
        if now - self._file >= FILE_SECONDS:
            self._file = now
            self.write()

    # Figures --------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Encoded by this run, those of shards in flight included."""
        flying = self._flying()
        return self._rows_done + sum(
            rows for s in self._stats.values() for name, rows in s.rows.items() if name in flying
        )

    def _flying(self) -> set[str]:
        """Names of the shards in flight."""
        running = self._scheduler.running.values() if self._scheduler else ()
        return {self._tasks[key].name for keys in running for key in keys}

    def rate(self, final: bool = False) -> float:
        """Rows a second: of the last minute, or of the whole run."""
        at, rows, _ = (self._began, 0, None) if final else self._past[0]
        return max(0, self.rows - rows) / max(time.monotonic() - at, 1e-9)

    def eta(self) -> float | None:
        """Seconds until the end, from the rows in the bytes that are done; None before the first."""
        rate = self.rate()
        if not self._bytes_done or not self._rows_done or not rate:
            return None
        failed = sum(
            self._tasks[k].size for k in (self._scheduler.given_up if self._scheduler else ())
        )
        expected = (self._bytes_left - failed) * self._rows_done / self._bytes_done
        return max(0.0, expected - self.rows) / rate

    def _text(self) -> str:
        since = self._past[0][2]
        words = [f"{self.rows:,} rows", f"{self.rate():,.0f} rows/s"]
        eta = self.eta()
        words.append("ETA unknown" if eta is None else f"ETA {duration_text(eta)}")
        share = self._totals.share(since)
        if share is not None:
            words.append(f"encoders busy {100 * share:.0f} %")
            if share < BUSY:
                words[-1] += f" (waiting for {REASONS[self._totals.reason(since)]})"
        return ", ".join(words)

    def record(self, final: bool = False) -> Json:
        """What progress.json holds."""
        scheduler = self._scheduler
        running = {} if scheduler is None else scheduler.running
        share, eta = self._totals.share(), self.eta()
        return {
            "format": FORMAT,
            "pid": os.getpid(),
            "host": platform.node(),
            "started": self._started,
            "updated": time.time(),
            "shards": {
                "total": len(self._tasks),
                "done": self._done,
                "failed": len(scheduler.given_up) if scheduler else 0,
                "running": sum(map(len, running.values())),
            },
            "rows": self.rows,
            "rows_per_s": round(self.rate(final), 2),
            "eta_s": None if eta is None else round(eta, 1),
            "busy": None if share is None else round(share, 4),
            "waits": {name: round(self._totals.waits[name], 3) for name in WAITS},
            "seconds": rounded(self._totals.seconds),
            "cpu": rounded(self._totals.cpu),
            "workers": [self._worker(w, s, running.get(w, ())) for w, s in self._stats.items()],
            "columns": {url: dict(counts) for url, counts in self._columns.items()},
        }

    def _worker(self, worker: int, stats: Stats, keys: Sequence[int]) -> Json:
        spent = stats.busy + sum(stats.waits.values())
        return {
            "worker": worker,
            "host": stats.node,
            "pid": stats.pid,
            "busy": round(stats.busy / spent, 4) if spent else None,
            "shards": [self._tasks[key].name for key in keys],
        }

    def write(self, final: bool = False) -> None:
        """Replace progress.json; what cannot be written costs the run nothing."""
        try:
            self._root.replace(PROGRESS, canonical_json(self.record(final)))
        except OSError as error:
            log.warning("%s not written: %s", self._root.at(PROGRESS), error)


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sorted(seconds.items())}
