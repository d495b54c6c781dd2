"""What reaches a terminal or a log: names, captions and errors may be strangers', and may hold escape
sequences; urls may hold passwords and signatures.

`command` and `safe_output` let every line of a command, its log and its tracebacks pass here. What
draws on a terminal takes `console`, and what it draws `one_line`.
"""

from __future__ import annotations

import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO, TypeVar

if TYPE_CHECKING:  # it is loaded where something is drawn
    from rich.console import Console

P = ParamSpec("P")
Code = TypeVar("Code", int, int | None)  # an exit code, None being 0
# all but tabs and ends of lines: C0, DEL, C1, ends of lines that only some know, what turns the
# direction of writing, and halves of characters
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# a user and a password, in which there may be a slash or `#` that should have been written as %2F
# or %23 (a number there is a port); or a user alone
USER = re.compile(r"(\b[A-Za-z][\w+.-]*):(//?)([^\s/?#:\[]+:(?!\d+[/?#])\S+|[^\s/?#]+)@")
QUERY = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s?#'\"<>]*)\?([^\s'\"<>]*[^\s'\"<>:,.;)])")
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # there the part before @ names no user
HIDDEN = "***"


def redacted(text: str) -> str:
    """Returns a text without users, passwords, tokens and signatures in its urls."""
    if ":/" not in text:
        return text

    def user(match: re.Match[str]) -> str:
        scheme, slashes, credentials = match.groups()
        keep = scheme in CONTAINERS and ":" not in credentials
        return match[0] if keep else f"{scheme}:{slashes}{HIDDEN}@"

    def query(match: re.Match[str]) -> str:
        if match[1].startswith("file:"):  # there it is part of a name
            return match[0]
        names = (part.partition("=")[:2] for part in match[2].split("&"))
        return f"{match[1]}?" + "&".join(
            f"{n}={HIDDEN}" if equals else HIDDEN for n, equals in names
        )

    return QUERY.sub(query, USER.sub(user, text))


def printable(text: str) -> str:
    """Returns a text as it may be printed: redacted, and its control characters as `\\x1b`."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], redacted(text))


def one_line(text: str) -> str:
    """As `printable`, with ends of lines and tabs written out too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class SafeStream:
    """A stream of text that takes what is printable. To libraries it is no terminal, so that they
    write no sequences of their own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # a bar of a library begins its line again
        with self._named():
            self.stream.write(start + printable(text[len(start) :]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Lets an error of a full disk say that it is this stream's."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or getattr(self.stream, "name", None)
            raise

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def safe_output() -> None:
    """Lets all that this process prints from now on pass `printable`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def command(main: Callable[P, Code]) -> Callable[P, Code]:
    """Decorates what runs a command and returns its exit code: its output is safe, and it ends with 0,
    without a word, where nobody reads its output any more: `| head -1` has seen enough.
    """

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Code:
        safe_output()
        try:
            code = main(*args, **kwargs)
        except BrokenPipeError:
            if not _output_closed():  # another pipe, of a worker or a server
                raise
            return 0
        except SystemExit:  # of `--help`, or of words that are wrong
            _output_closed()
            raise
        _output_closed()
        return code

    return wrapped


def _output_closed() -> bool:
    """Returns whether stdout is a pipe that its reader has closed. What is left to print is then
    dropped.
    """
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, or none of the system's
        return False
    state = select.poll()
    state.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in state.poll(0)):
        return False
    drop_output()
    return True


def drop_output() -> None:
    """Drops what is left to print, where the interpreter would complain at its end that it cannot."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def raw(stream: Any) -> TextIO:
    """Returns the stream itself, for what draws on a terminal."""
    inner: TextIO = stream.stream if isinstance(stream, SafeStream) else stream
    return inner


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console that takes brackets and colons as they are. What is drawn on it is not made
    printable: see `one_line`.
    """
    from rich.console import Console

    stream = raw(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, quiet=quiet, markup=False, emoji=False, highlight=False)


class Lines(logging.StreamHandler):  # type: ignore[type-arg]  # no class of its own at run time
    """Writes log lines to stdout. Where one cannot be written (a full disk, a closed pipe) this is said once
    on stderr, in place of a traceback a line, and the work goes on.
    """

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            with suppress(OSError, ValueError):
                print(
                    f"log lines cannot be written ({error}); the work goes on",
                    file=sys.stderr,
                    flush=True,
                )
