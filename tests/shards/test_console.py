"""Sizes, durations, and what a long pass prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shards import console
from shards.console import Bar


def test_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred pictures, twenty of them there before: ten in five seconds are two a second, seventy more 35 s."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Bar("geneval", 100, "pictures", console=Console(file=out)) as bar:
        bar.skip(20)
        assert bar.pace() == ""
        now[0] += 5
        bar.advance(10)
        assert bar.pace() == "2/s, 0:00:35 to go"
        assert out.getvalue() == ""
        now[0] += 25
        bar.advance(20)
        assert out.getvalue() == "geneval 50/100 pictures, 1/s, 0:00:50 to go\n"
        bar.advance(50)
    *_, last = out.getvalue().splitlines()
    assert last == "geneval 100/100 pictures in 0:00:30, 2.67/s"


def test_only_what_was_done_is_told() -> None:
    out = io.StringIO()
    with Bar("geneval", 3, "pictures", console=Console(file=out)) as bar:
        bar.skip(3)

    def fails() -> None:
        with Bar("geneval", 3, "pictures", console=Console(file=out)) as bar:
            bar.advance(1)
            raise KeyError

    pytest.raises(KeyError, fails)
    with Bar("geneval", 3, "pictures", shown=False) as bar:
        bar.advance(3)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Bar(
        "dpg", 4, "pictures", console=Console(file=out, force_terminal=True, width=100)
    ) as bar:
        bar.advance(4)
    last = out.getvalue().rpartition("\r")[2]
    assert "4/4 pictures in 0:00:00, " in last
    assert "to go" not in last


def test_sizes_and_durations() -> None:
    sizes = (0, 999, 1000, 2.5e9, 3e15)
    assert [console.size_text(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1.00 kB", "2.50 GB", "3.00 PB",
    ]  # fmt: skip
    seconds = (0, 59.6, 3723, 86_400 + 3723)
    assert [console.duration_text(s) for s in seconds] == [
        "0:00:00", "0:01:00", "1:02:03", "1 d 01:02:03",
    ]  # fmt: skip


def test_numbers_are_as_people_write_them() -> None:
    values = (0, 0.0256, 2.5, 99.46, 123.4, 4750.4, 1.25e6, -4750)
    assert [console.number_text(value) for value in values] == [
        "0", "0.0256", "2.5", "99.5", "123", "4,750", "1,250,000", "-4,750",
    ]  # fmt: skip


def test_bytes_have_a_rate_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Bar("copy", None, "bytes", console=Console(file=out)) as bar:
        now[0] += 10
        bar.advance(15_000_000)
        assert bar.pace() == "1.50 MB/s"
        bar.begin(30_000_000)
        assert bar.pace() == "1.50 MB/s, 0:00:10 to go"
    assert out.getvalue() == "copy 15.00 MB of 30.00 MB in 0:00:10, 1.50 MB/s\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["seeds=[0]"], ". No KEY=VALUE is taken here: write it into the YAML, if there is one\n"),
        (["--optim.lr=1"], ". A key of a config is set by KEY=VALUE, without hyphens\n"),
        (["--other"], "unrecognized arguments: --other\n"),
    ],
)
def test_keys_where_none_are_taken(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        console.Parser(prog="program").parse_args(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(hint)


def test_words_behind_a_config_are_not_required(capsys: pytest.CaptureFixture[str]) -> None:
    parser = console.Parser(prog="program")
    console.config_words(parser)
    assert parser.parse_args(["a.yaml"]).overrides == []
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err.endswith("arguments are required: config\n")
