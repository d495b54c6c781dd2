"""Numbers on the command line, refused by argparse where they make no sense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


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


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that is a finite number from `least` to `most`."""

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
