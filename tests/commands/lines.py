"""Command lines that programs print, read by the parser that would run them."""

from __future__ import annotations

import argparse
import shlex

import pytest

from configs.completion import MODULES, parser_of
from shards.console import Parser
from train.__main__ import VERBS


def parsed(line: str) -> argparse.Namespace:
    """Returns the words of `python -m STAGE ...`, of which a `#` begins a comment; fails where its verb
    or a flag does not exist.
    """
    words = shlex.split(line, comments=True)
    start = words.index("-m") + 1
    assert words[start] in MODULES, line
    words = words[start:]
    if words[0] == "train" and words[1] not in VERBS:  # a config, and keys over it
        assert all("=" in word for word in words[2:]), line
        del words[2:]
    try:
        return parser_of(words, Parser).parse_args(words)
    except SystemExit:
        pytest.fail(f"not a command: {line}")


def next_lines(output: str) -> list[str]:
    """Returns the commands that an output says come next, each of which parses."""
    heads = ("next: ", "then: ")
    lines = [line for line in output.splitlines() if line.startswith(heads)]
    for line in lines:
        parsed(line)
    return lines
