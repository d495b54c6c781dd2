"""What a long pass says of itself where there is no terminal."""

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
    with Bar("geneval", 100, "pictures", console=Console(file=out)) as shown:
        shown.skip(20)
        assert shown.pace() == ""
        now[0] += 5
        shown.advance(10)
        assert shown.pace() == "2/s, 0:00:35 to go"
        assert out.getvalue() == ""
        now[0] += 25
        shown.advance(20)
        assert out.getvalue() == "geneval 50/100 pictures, 1/s, 0:00:50 to go\n"
        shown.advance(50)
    *_, last = out.getvalue().splitlines()
    assert last == "geneval 100/100 pictures in 0:00:30"


def test_only_what_was_done_is_told() -> None:
    out = io.StringIO()
    with Bar("geneval", 3, "pictures", console=Console(file=out)) as shown:
        shown.skip(3)

    def fails() -> None:
        with Bar("geneval", 3, "pictures", console=Console(file=out)) as shown:
            shown.advance(1)
            raise KeyError

    pytest.raises(KeyError, fails)
    with Bar("geneval", 3, "pictures", shown=False) as shown:
        shown.advance(3)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Bar(
        "dpg", 4, "pictures", console=Console(file=out, force_terminal=True, width=100)
    ) as shown:
        shown.advance(4)
    assert "4/4" in out.getvalue()
    assert "0:00:00 to go" in out.getvalue()
