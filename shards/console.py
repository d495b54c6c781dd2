"""What commands print and read on a terminal: tables, sizes and durations as text, a progress bar,
and the types of numeric options.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from . import printing
from .places import local_path
from .printing import one_line
from .tables import fitted, terminal_width, wrapped

if TYPE_CHECKING:  # rich is loaded where something is drawn
    from rich.console import Console

WIDTH = 118  # characters of a table
LINE_SECONDS = 30.0  # between two lines of progress where the output is no terminal
SHORT = 5.0  # seconds of a pass that says nothing at its end
DAY = 86_400  # seconds
NEXT = "next: "  # before a command that usually follows


# Text ---------------------------------------------------------------------------------------------


def render(*parts: Any, width: int | None = None) -> str:
    """Returns tables and lines as plain text, both at most as wide as the terminal and tables as
    `width`. Lines are cut between words, a key in front hangs out; those of `next_text` stay whole, since
    they are typed.
    """
    from rich.console import Console
    from rich.table import Table

    width = terminal_width(width or WIDTH)
    console = Console(
        file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False
    )  # fmt: skip
    for part in parts:
        drawn = fitted(part, console, width) if isinstance(part, Table) else part
        if isinstance(part, str) and not part.startswith(NEXT):
            key = re.match(r"\S+ {2,}", part)
            drawn = "\n".join(wrapped(part, " " * len(key[0]) if key else "  "))
        console.print(drawn, soft_wrap=isinstance(drawn, str))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def overview(prog: str, purpose: str, verbs: Mapping[str, str], examples: Sequence[str]) -> str:
    """Returns what a command prints that is called without a word: its verbs and how to begin."""
    width = max(map(len, verbs))
    lines = [f"  {verb:{width}}  {text}" for verb, text in verbs.items()]
    begin = f"{examples_text(examples)}\n"
    more = f"`{prog} VERB --help` lists what a verb takes, `{prog} --help` says more of all."
    return "\n".join([f"{prog}: {purpose}", "", *lines, "", begin, more])


def examples_text(examples: Sequence[str]) -> str:
    """Returns the command lines under `For example:`, as an overview and the end of a help have them."""
    return "\n".join(["For example:\n", *(f"  {line}" for line in examples)])


def next_text(*words: object, note: str = "") -> str:
    """Returns the line of the command that usually follows, as it can be typed, with a note behind."""
    line = f"{NEXT}python -m " + shlex.join(map(str, words))
    return one_line(line + (f"    # {note}" if note else ""))


def say_next(*words: object, note: str = "", file: TextIO | None = None) -> None:
    """Prints `next_text`: on stdout, or on the `file` where stdout is for a program."""
    print(next_text(*words, note=note), file=file, flush=True)


def number_text(value: float, digits: int = 3) -> str:
    """Returns a number as people write it, of about so many digits: 0.25, 99.5, 4,750."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def counted(count: float, noun: str, nouns: str = "", digits: int = 0) -> str:
    """Returns a number with its noun: 1 tar, 1,234 tars; `nouns` are several where an s does not do."""
    return f"{count:,.{digits}f} {noun if count == 1 else nouns or f'{noun}s'}"


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


def is_digest(value: Any) -> bool:
    """Whether a value is a sha256 in hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def brief(value: Any) -> str:
    """Returns a setting for people; of digests the first twelve characters."""
    if is_digest(value):
        return str(value)[:12]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(brief, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


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
            "NoBenchmarks: they are in tests/bench of the repository, which is not installed with "
            f"the packages. Run this from a checkout, as `python -m STAGE bench`.{hidden}"
        ) from None


# Progress -----------------------------------------------------------------------------------------


class Bar:
    """How far a long pass is, how fast, and how long it will take: a bar on a terminal, elsewhere a
    line every LINE_SECONDS. At the end the bar says how long it took and its mean rate, elsewhere
    a line does unless it was SHORT.

        with Bar("geneval", 2212, "pictures") as bar:
            bar.skip(12)  # done by an earlier attempt: not counted in the rate
            bar.advance(4)

    The unit "bytes" is shown as kB, MB and so on. `total` may be None until `begin`. `text`, if
    given, says what follows the bar instead of rate and time to go, and `mean` the rate at the end.
    Of several processes that share a screen, one is `shown`. Any thread may call it.
    """

    def __init__(
        self, name: str, total: float | None = None, unit: str = "", *, stderr: bool = True,
        shown: bool = True, text: Callable[[], str] | None = None, mean: Callable[[], str] | None = None,
        console: Console | None = None,
    ) -> None:  # fmt: skip
        from rich.progress import BarColumn, Progress, TextColumn

        self._name, self._total, self._unit, self._text = name, total, unit, text or self.pace
        self._mean = mean or self._speed
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
        seconds = time.monotonic() - self._began
        if kind is None and self._done:
            end = ", ".join(filter(None, [f"in {duration_text(seconds)}", self._mean()]))
            self._text = lambda: end
        self._draw()
        self._bar.stop()
        if kind is None and self._done and not self._console.is_terminal and seconds >= SHORT:
            self.note(f"{self._name} {self._count()} {end}")

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
        rate = self._rate()
        if not rate or self._total is None:
            return self._speed()
        seconds = (self._total - self._skipped - self._done) / rate
        return f"{self._speed()}, {duration_text(seconds)} to go"

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._began, 1e-9)

    def _speed(self) -> str:
        rate = self._rate()
        if not rate:
            return ""
        return f"{size_text(rate) if self._unit == 'bytes' else number_text(rate)}/s"

    def _count(self) -> str:
        done = self._done + self._skipped
        if self._unit == "bytes":
            return size_text(done) + (
                "" if self._total is None else f" of {size_text(self._total)}"
            )
        total = "" if self._total is None else f"/{self._total:,.0f}"
        return f"{done:,.0f}{total} {self._unit}"

    def _draw(self) -> None:
        if self._console.is_terminal:
            self._bar.update(
                self._task, completed=self._done + self._skipped, count=self._count(),
                text=one_line(self._text()),
            )  # fmt: skip


# Options ------------------------------------------------------------------------------------------


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, unless its text does; a description of one line is
    wrapped.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, default_text(action)
        if text is not None:  # of BooleanOptionalAction, before Python 3.13
            text = text.removesuffix(" (default: %(default)s)")
        if text is None or not default or "default" in text:
            return text
        return f"{text} (default: {default.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def default_text(action: argparse.Action) -> str:
    """Returns the default of a flag as it is typed; empty where there is none to speak of."""
    default = action.default
    optional = action.option_strings or action.nargs in ("?", "*")
    if not optional or default is argparse.SUPPRESS or default is None or default is False:
        return ""
    if default is True:
        return "on" if isinstance(action, argparse.BooleanOptionalAction) else ""
    values = default if isinstance(default, list | tuple) else [default]
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


class Parser(argparse.ArgumentParser):
    """Names the nearest verb or word where one is unknown, shows defaults, and takes flags with
    dashes and with underscores; so do the parsers of its verbs. What is refused begins with
    `WrongWords`, as every error begins with its name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help} | options)

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.print_usage(sys.stderr)
        if message.startswith("unrecognized"):
            if re.search(r" \w[\w.]*=", message):
                message += ". No KEY=VALUE is taken here: write it into the YAML, if there is one"
            elif re.search(r" --\w+\.\w", message):
                message += ". A key of a config is set by KEY=VALUE, without hyphens"
        self.exit(2, f"WrongWords: {self.prog}: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args(
            [*map(self._as_documented, words[:end]), *words[end:]], namespace
        )

    def _as_documented(self, word: str) -> str:
        """Returns a flag, which may be cut short, with dashes and underscores as its help has them."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return word
        same = [f for f in self._option_string_actions if _dashed(f).startswith(_dashed(name))]
        same.sort(key=len)  # one that is equal comes first
        if not same or any(flag.startswith(name) for flag in same):
            return word
        return same[0][: len(name)] + equals + value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            names = [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
            error.message += "".join(f"; did you mean {name}?" for name in near)
            raise


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def config_words(parser: argparse.ArgumentParser) -> None:
    """Adds a config and the keys that are set over it, as `config` and `overrides`."""
    text = "a YAML file, or a shipped one by its name, as configs:STAGE/NAME"
    parser.add_argument("config", type=local_path, help=text)
    text = "keys to set over it, as optim.lr=1e-4"
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=value", help=text)


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


def bound(text: str) -> tuple[str, float]:
    """Type of an option that is NAME=NUMBER; returns both."""
    name, equals, word = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=NUMBER, such as score=5.5")
    return name, number(-math.inf)(word)


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
