"""Nothing that a stranger wrote reaches a terminal or a log raw, and no credential at all."""

from __future__ import annotations

import io
import os
import pty
import string
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from shards import open_store
from shards.__main__ import main
from shards.console import render
from shards.errors import StoreError
from shards.places import NotLocal, place
from shards.printing import SafeStream, console, one_line, printable, redacted, safe_output

EVIL = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202etxt.exe\x08\r[bold]x[/bold] [/] :warning: {y}"
ROOT = Path(__file__).parents[2]


@given(st.text())
def test_every_character_that_is_no_text_is_written_out(text: str) -> None:
    output = printable(text)
    assert all(c.isprintable() or c in "\n\t" or c.isspace() or c > "\x9f" for c in output)
    assert not set(output) & {"\x1b", "\x9b", "\r", "\x07", "\x08", "\u202e", "\u2066"}
    output.encode()  # halves of characters too
    assert "\n" not in one_line(text)
    if text.isprintable() and ":/" not in text:
        assert output == text


# a slash, too: keys of S3 have them, and are pasted as they are
WORDS = st.text(
    string.ascii_letters + string.digits + "._~%!$*+-:@/#?", min_size=4, max_size=30
).map("Qq{}Zz".format)


@given(WORDS, st.sampled_from(["https", "http", "s3", "gs", "az", "hf", "abfs", "https:"]))
def test_a_password_in_a_url_is_never_shown(secret: str, scheme: str) -> None:
    scheme, slash = (scheme[:-1], "/") if scheme.endswith(":") else (scheme, "//")
    for url in (
        f"{scheme}:{slash}me:{secret}<@host/a.tar",
        f"x '{scheme}:{slash}u:{secret}<@h', y",
    ):
        assert f"{secret}<" not in redacted(url)
        assert "***@" in redacted(url)


@given(WORDS, st.sampled_from(["X-Amz-Signature", "sig", "token", "access_token", "Signature", ""]))
def test_a_signature_in_a_url_is_never_shown(secret: str, name: str) -> None:
    query = f"{name}={secret}<".removeprefix("=").removesuffix("<")
    output = redacted(f"https://h/a.tar?{query}&expires=7 and more")
    assert secret not in output
    assert output.startswith("https://h/a.tar?")
    assert output.endswith(" and more")


@pytest.mark.parametrize("text", [
    "https://h/a@b.tar", "s3://b/x@1", "me@example.org", "abfs://c@a.net/x", "file:///a?b", "a?b=c", "12:30/x@y z",
])  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_a_sentence_goes_on_behind_a_url() -> None:
    assert redacted("https://h/a?x=1: no such file (https://h/b?2).") == (
        "https://h/a?x=***: no such file (https://h/b?***)."
    )


def test_streams() -> None:
    inner = io.StringIO()
    with redirect_stdout(inner), redirect_stderr(inner):
        safe_output()
        safe_output()
        print(f"name {EVIL}\nnext")
        sys.stderr.write("\r 50 %")
        assert not sys.stdout.isatty()
        assert isinstance(sys.stdout, SafeStream)
        assert not isinstance(sys.stdout.stream, SafeStream)
    assert inner.getvalue() == f"name {printable(EVIL)}\nnext\n\r 50 %"


def test_tables_keep_brackets_and_colons() -> None:
    table = Table("[a]", "b", title="[t]")
    table.add_row("x[/]", ":smile: [red]")
    output = render(table, "[line] :x:")
    for text in ("[a]", "[t]", "x[/]", ":smile: [red]", "[line] :x:"):
        assert text in output


def test_consoles_keep_brackets_and_colons() -> None:
    output = io.StringIO()
    with redirect_stderr(output):
        console(stderr=True).print(one_line(EVIL), soft_wrap=True)
    assert output.getvalue() == one_line(EVIL) + "\n"


def test_a_command_on_a_terminal(tmp_path: Path) -> None:
    """A path with sequences in it, and the traceback of a fault, through a real terminal."""
    leader, follower = pty.openpty()
    code = (
        "import sys, runpy; from shards.printing import safe_output; safe_output();"
        "sys.argv = ['shards', 'info', '\\x1b[31mred']; import shards.__main__ as m; m.main();"
        "raise RuntimeError('\\x1b]0;t\\x07')"
    )
    result = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm"}
    )  # fmt: skip
    assert result.wait() == 1
    os.close(follower)
    output = b""
    try:
        while part := os.read(leader, 65536):
            output += part
    except OSError:  # the end, on Linux
        pass
    os.close(leader)
    assert b"\x1b" not in output
    assert b"NotAColumn: \\x1b[31mred: no such folder" in output
    assert b"\\x1b]0;t\\x07" in output


@pytest.mark.parametrize("url", [
    "s3://me:SECRET@bucket/a", "gs://SECRET@bucket/a", "https://me:SECRET@host/a", "https://host/a?token=SECRET",
    "http://me:SECRET@host/a?sig=SECRET#SECRET", "az://me:SECRET@c/a", "s3://me:x/SECRET@bucket/a", "https://me:x/SECRET@host/a",
    "https://me:x?SECRET@host/a",
])  # fmt: skip
def test_stores_refuse_credentials_and_do_not_repeat_them(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreError) as refused:
        open_store(url)
    assert "SECRET" not in str(refused.value)
    with pytest.raises(NotLocal) as output:
        place(url)
    assert "SECRET" not in str(output.value)
    sys.argv = ["shards", "info", url]
    assert main() == 2
    out, err = capsys.readouterr()
    assert "SECRET" not in out + err


def test_log_lines_that_cannot_be_written_are_said_once_and_the_work_goes_on() -> None:
    code = (
        "import logging, sys\nfrom shards.printing import Lines\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[Lines()])\n"
        "for step in range(3): logging.info('step %d', step)\n"
        "logging.info('a bug %d', 'no number')\n"
        "print('done', file=sys.stderr)\n"
        "import os; os._exit(0)"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    lines = process.stderr.splitlines()
    assert (
        lines[0]
        == "log lines cannot be written ([Errno 28] No space left on device); the work goes on"
    )
    assert lines[-1] == "done"
    assert process.stderr.count("cannot be written") == 1
    assert (
        "not all arguments converted" in process.stderr or "%d format" in process.stderr
    )  # a fault is shown
