"""Numbers on the command line, refused by argparse where they make no sense."""

from __future__ import annotations

import argparse


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not least <= value < 2**64:
        raise argparse.ArgumentTypeError(f"found {value}, expected {least} or more, below 2^64")
    return value


def positive(text: str) -> int:
    return _whole(text, 1)


def not_negative(text: str) -> int:
    return _whole(text, 0)
