"""How far a long pass is, how fast, and how long it will take: a bar on a terminal, a line now and then elsewhere,
and one at the end."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shards import printing
from shards.printing import one_line

LINE_SECONDS = 30.0


class Bar:
    """`with Bar("geneval", 2212, "pictures") as bar`, then `bar.advance(n)` after each piece of work.

    Of several processes that share a screen, one is `shown`.
    """

    def __init__(
        self, name: str, total: int, unit: str, console: Console | None = None, shown: bool = True
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._console = console or printing.console(stderr=True, quiet=not shown)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TextColumn("{task.fields[told]}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(one_line(name), total=total, told="")
        self._began = self._line = time.monotonic()
        self._done = self._skipped = 0

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None and self._done and not self._console.is_terminal:
            self.note(f"{self._count()} in {_clock(time.monotonic() - self._began)}")

    def skip(self, count: int) -> None:
        """What was there before: it does not count for the rate."""
        self._skipped += count
        self._bar.update(self._task, advance=count)

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.update(self._task, advance=count, told=self.told())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._line >= LINE_SECONDS:
            self._line = now
            self.note(f"{self._count()}, {self.told()}")

    def _count(self) -> str:
        return f"{self._name} {self._done + self._skipped}/{self._total} {self._unit}"

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(
            one_line(text), highlight=False, markup=False, emoji=False, soft_wrap=True
        )

    def told(self) -> str:
        """Rate and time to go."""
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        if not rate:
            return ""
        return f"{rate:.3g}/s, {_clock((self._total - self._skipped - self._done) / rate)} to go"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
