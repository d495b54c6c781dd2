"""What commands print and read on a terminal: tables, sizes and durations as text, a progress bar,
and the types of numeric options.
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import printing
from .printing import one_line

if TYPE_CHECKING:  # rich is loaded where something is drawn
    from rich.console import Console

WIDTH = 118  # characters of a table
LINE_SECONDS = 30.0  # between two lines of progress where the output is no terminal
SHORT = 5.0  # seconds of a pass that says nothing at its end
DAY = 86_400  # seconds


# Text ---------------------------------------------------------------------------------------------


def render(*parts: Any, width: int = WIDTH) -> str:
    """Returns tables and lines as plain text of at most `width` columns; lines are not wrapped."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False
    )  # fmt: skip
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def overview(prog: str, purpose: str, verbs: Mapping[str, str], example: str) -> str:
    """Returns what a command prints that is called without a word: its verbs and how to begin."""
    width = max(map(len, verbs))
    lines = [f"  {verb:{width}}  {text}" for verb, text in verbs.items()]
    begin = f"For example:\n\n  {example}\n"
    more = f"`{prog} VERB --help` lists what a verb takes, `{prog} --help` says more of all."
    return "\n".join([f"{prog}: {purpose}", "", *lines, "", begin, more])


def size_text(size: float) -> str:
    """Returns bytes in decimal units, as disks are sold: 999 bytes, 1.50 GB."""
    from rich.filesize import decimal

    return decimal(round(size), precision=2)


def duration_text(seconds: float) -> str:
    """Returns 1:02:03, and of a day or more 1 d 02:03:04."""
    days, rest = divmod(max(0, round(seconds)), DAY)
    hours, minutes, seconds = rest // 3600, rest % 3600 // 60, rest % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def without_nan(value: Any) -> Any:
    """Returns a JSON value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bench_module(name: str) -> Any:
    """Returns a module of tests/bench, which exists in a checkout of the repository only."""
    import importlib

    try:
        return importlib.import_module(f"tests.bench.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tests"):
            raise
        other = getattr(sys.modules.get("tests"), "__file__", None)
        hidden = f" The package `tests` that was loaded is {other}" if other else ""
        raise SystemExit(
            "error: benchmarks are in tests/bench of the repository, which is not installed with "
            f"the packages. Run this from a checkout, as `python -m STAGE bench`.{hidden}"
        ) from None


# Progress -----------------------------------------------------------------------------------------


class Bar:
    """How far a long pass is, how fast, and how long it will take: a bar on a terminal, elsewhere a
    line every LINE_SECONDS, and one at the end unless it was SHORT.

        with Bar("geneval", 2212, "pictures") as bar:
            bar.skip(12)  # done by an earlier attempt: not counted in the rate
            bar.advance(4)

    The unit "bytes" is shown as kB, MB and so on. `total` may be None until `begin`. `text`, if
    given, says what follows the bar instead of rate and time to go. Of several processes that share
    a screen, one is `shown`. Any thread may call it.
    """

    def __init__(
        self, name: str, total: float | None = None, unit: str = "", *, stderr: bool = True,
        shown: bool = True, text: Callable[[], str] | None = None, console: Console | None = None,
    ) -> None:  # fmt: skip
        from rich.progress import BarColumn, Progress, TextColumn

        self._name, self._total, self._unit, self._text = name, total, unit, text or self.pace
        self._console = console or printing.console(stderr=stderr, quiet=not shown)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(one_line(name), total=total, count="", text="")
        self._lock = threading.Lock()
        self._began = self._line = time.monotonic()
        self._done = self._skipped = 0.0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._draw()
        self._bar.stop()
        seconds = time.monotonic() - self._began
        if kind is None and self._done and not self._console.is_terminal and seconds >= SHORT:
            self.note(f"{self._name} {self._count()} in {duration_text(seconds)}")

    def begin(self, total: float) -> None:
        """Sets the total once it is known."""
        self._total = total
        self._bar.update(self._task, total=total)

    def skip(self, count: float) -> None:
        """Adds what was done before this attempt, which does not count for the rate."""
        with self._lock:
            self._skipped += count
        self._draw()

    def advance(self, count: float) -> None:
        """Adds work that is done."""
        with self._lock:
            self._done += count
        self._draw()
        now = time.monotonic()
        if not self._console.is_terminal and now - self._line >= LINE_SECONDS:
            self._line = now
            self.note(f"{self._name} {self._count()}, {self._text()}")

    def note(self, text: str) -> None:
        """Prints a line that stays. A closed pipe or a full disk behind it does not end the work."""
        with suppress(OSError, SystemExit):  # rich leaves the program where a pipe is closed
            self._console.print(one_line(text), soft_wrap=True)

    def pace(self) -> str:
        """Returns rate and time to go, empty before anything is done."""
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        if not rate:
            return ""
        speed = f"{size_text(rate)}/s" if self._unit == "bytes" else f"{rate:.3g}/s"
        if self._total is None:
            return speed
        return f"{speed}, {duration_text((self._total - self._skipped - self._done) / rate)} to go"

    def _count(self) -> str:
        done = self._done + self._skipped
        if self._unit == "bytes":
            return size_text(done) + (
                "" if self._total is None else f" of {size_text(self._total)}"
            )
        total = "" if self._total is None else f"/{self._total:.0f}"
        return f"{done:.0f}{total} {self._unit}"

    def _draw(self) -> None:
        if self._console.is_terminal:
            self._bar.update(
                self._task, completed=self._done + self._skipped, count=self._count(),
                text=one_line(self._text()),
            )  # fmt: skip


# Options ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Names the nearest verb or word where one is unknown; so do the parsers of its verbs."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            names = [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
            error.message += "".join(f"; did you mean {name}?" for name in near)
            raise


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number") from None
    if not least <= value < 2**64:
        raise argparse.ArgumentTypeError(f"found {value}, expected {least} or more, below 2^64")
    return value


def positive(text: str) -> int:
    """Type of an option that is an integer of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """Type of an option that is an integer of at least 0."""
    return _whole(text, 0)


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """Returns the type of an option that is a finite number from `least` to `most`."""

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            above = "" if most == math.inf else f", at most {most:g}"
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected a number of at least {least:g}{above}"
            )
        return value

    return parsed
