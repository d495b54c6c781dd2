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

from shards import Store, canonical_json
from shards.console import Bar, counted, duration_text, number_text
from shards.format.atomic import Json

from ..meter import WAITS, Seconds, Stats, none_spent
from ..report.status import BUSY, FORMAT, PROGRESS
from ..tasks import ShardResult, ShardTask
from .scheduler import Scheduler

log = logging.getLogger(__name__)
FILE_SECONDS, BAR_SECONDS = 5.0, 0.5
WINDOW = 60.0  # seconds that the rates shown at the moment are of
REASONS = {"decode": "decoding", "read": "tars", "write": "the disk", "idle": "shards"}


class Progress:
    """Progress over shards; `with Progress(root, tasks) as progress`."""

    def __init__(self, root: Store, tasks: Sequence[ShardTask]) -> None:
        self._root, self._tasks = root, tasks
        self._bar = Bar("encode", len(tasks), "shards", text=self._text, mean=self._mean)
        self._began, self._started = time.monotonic(), time.time()
        self._file = self._drawn = self._began
        self._bytes_left = sum(task.size for task in tasks)
        self._bytes_done = self._rows_done = self._done = 0
        self._scheduler: Scheduler[int] | None = None
        self._stats: dict[int, Stats] = {}
        # Seconds of all workers, also of those that died: of the encoders (busy) and of waits; by
        # stage; of the CPU by stage.
        self._time, self._seconds, self._cpu = none_spent(), none_spent(), none_spent()
        self._columns: dict[str, Counter[str]] = {}
        # time, rows and seconds at each update of the last minute
        self._past: deque[tuple[float, int, Seconds]] = deque([(self._began, 0, none_spent())])

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._bar.__exit__(*error)  # type: ignore[arg-type]  # as they came
        if self._scheduler is not None:
            self.write(final=True)

    def note(self, text: str) -> None:
        """Prints a line that stays. The disk that takes it may be full: the run goes on."""
        with suppress(OSError):
            self._bar.note(text)

    def shard_done(self, key: int, result: ShardResult) -> None:
        """Counts a shard that is committed."""
        task = self._tasks[key]
        self._done += 1
        self._bytes_done += task.size
        self._rows_done += result.rows
        for name, target in task.targets.items():
            column = self._columns.setdefault(target.store.url, Counter())
            column["shards"] += 1
            column["rows"] += sum(result.counts.get(name, {}).values())
        with suppress(OSError):
            self._bar.advance(1)
        if result.note:
            self.note(f"{task.name}: {result.note}; {counted(result.rows, 'row')} kept")

    def gone(self, worker: int) -> None:
        """Forgets a worker that died; another one in its place counts from nothing."""
        self._stats.pop(worker, None)

    def update(
        self, scheduler: Scheduler[int], stats: Mapping[int, Stats], at_once: bool = False
    ) -> None:
        """Takes the state of the run; draws, prints and writes it when it is time to."""
        self._scheduler = scheduler
        now = time.monotonic()
        if now - self._drawn < BAR_SECONDS and not at_once:
            return
        self._drawn = now
        for worker, new in stats.items():
            old = self._stats.get(worker)
            self._add(new, 1)
            if old is not None and old.pid == new.pid:
                self._add(old, -1)
        self._stats = dict(stats)
        self._past.append((now, self.rows, self._time.copy()))
        while now - self._past[0][0] > WINDOW:
            self._past.popleft()
        with suppress(OSError):
            self._bar.advance(0)
        if now - self._file >= FILE_SECONDS:
            self._file = now
            self.write()

    def _add(self, stats: Stats, sign: int) -> None:
        for total, seconds in (
            (self._time, {"busy": stats.busy, **stats.waits}),
            (self._seconds, stats.seconds), (self._cpu, stats.cpu),
        ):  # fmt: skip
            for name, value in seconds.items():
                total[name] += sign * value

    # Figures --------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows encoded by this run, those of shards in flight included."""
        running = self._scheduler.running.values() if self._scheduler else ()
        in_flight = {self._tasks[key].name for keys in running for key in keys}
        return self._rows_done + sum(
            rows for s in self._stats.values() for name, rows in s.rows.items() if name in in_flight
        )

    def rate(self, final: bool = False) -> float:
        """Returns rows a second: of the last minute, or of the whole run."""
        at, rows, _ = (self._began, 0, None) if final else self._past[0]
        return max(0, self.rows - rows) / max(time.monotonic() - at, 1e-9)

    def eta(self) -> float | None:
        """Returns the seconds until the end, by the rows in the bytes so far; None before any."""
        rate = self.rate()
        if not self._bytes_done or not self._rows_done or not rate:
            return None
        given_up = self._scheduler.given_up if self._scheduler else ()
        failed_bytes = sum(self._tasks[key].size for key in given_up)
        expected = (self._bytes_left - failed_bytes) * self._rows_done / self._bytes_done
        return max(0.0, expected - self.rows) / rate

    def _text(self) -> str:
        eta, past = self.eta(), self._past[0][2]
        seconds = {name: value - past.get(name, 0.0) for name, value in self._time.items()}
        words = f"{counted(self.rows, 'row')}, {self.rate():,.0f} rows/s, ETA "
        words += "unknown" if eta is None else duration_text(eta)
        share = busy_share(seconds)
        if share is not None:
            words += f", encoders busy {100 * share:.0f} %"
            if share < BUSY:
                words += (
                    f" (waiting for {REASONS[max(WAITS, key=lambda name: seconds.get(name, 0.0))]})"
                )
        return words

    def _mean(self) -> str:
        return f"{number_text(self.rate(final=True))} rows/s"

    def record(self, final: bool = False) -> Json:
        """Returns what progress.json holds."""
        scheduler = self._scheduler
        running = {} if scheduler is None else scheduler.running
        eta = self.eta()
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
            "busy": busy_share(self._time),
            "waits": {name: round(self._time[name], 3) for name in WAITS},
            "seconds": rounded(self._seconds),
            "cpu": rounded(self._cpu),
            "workers": [
                {
                    "worker": worker, "host": stats.node, "pid": stats.pid,
                    "busy": busy_share({"busy": stats.busy, **stats.waits}),
                    "shards": [self._tasks[key].name for key in running.get(worker, ())],
                }
                for worker, stats in self._stats.items()
            ],
            "columns": {url: dict(counts) for url, counts in self._columns.items()},
        }  # fmt: skip

    def write(self, final: bool = False) -> None:
        """Replaces progress.json; what cannot be written costs the run nothing."""
        try:
            self._root.replace(PROGRESS, canonical_json(self.record(final)))
        except OSError as error:
            log.warning("%s not written: %s", self._root.at(PROGRESS), error)


def busy_share(seconds: Mapping[str, float]) -> float | None:
    """Returns the share of the workers' time in which an encoder ran; None before any time."""
    total = sum(seconds.values())
    return round(seconds["busy"] / total, 4) if total > 0 else None


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sorted(seconds.items())}
