"""How people name places: folders and files of this machine, and urls.

Types for command lines and configs, which check a word as it was typed: a `Path` would already have
made `s3:/bucket` of `s3://bucket`, and a folder of that name would be written into.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import NotAColumn
from .printing import redacted

# a scheme; the second form is what is left of a url that was a Path once
URL = re.compile(r"[A-Za-z][\w+.-]*://|(?:s3|gs|az|https?|hf|file):/")


class NotLocal(NotAColumn, argparse.ArgumentTypeError, ValueError):
    """A url where a folder or file of this machine is expected, or a home folder that is not."""


def is_url(word: str) -> bool:
    """Returns whether a word names a place by a url, file:// among them."""
    return URL.match(word) is not None


def home(word: str) -> str:
    """Returns a path with `~` or `~user` in front written out, as a shell does; urls as they are."""
    if not word.startswith("~"):
        return word
    path = os.path.expanduser(word)
    if path.startswith("~"):
        raise NotLocal(
            f"{word}: no such user's home folder. Write the path in full, or ./{word} for a file of "
            "that name"
        )
    return path


def path_of(url: str) -> str:
    """Returns the path that a `file://` url names: all that follows, a `#` or `?` too."""
    host, slash, path = url.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise NotLocal(
            f"{url}: found the host {host!r}, expected file:// and an absolute path of this machine, "
            "such as file:///data/column"
        )
    return unquote(slash + path, errors="surrogateescape")


def local_path(word: Any) -> Any:
    """Returns a path of this machine from a typed word; NotLocal for a url, before anything is done."""
    if not isinstance(word, str | Path):
        return word  # pydantic says what is wrong with it
    text = str(word)
    if text.startswith("file://"):
        return Path(path_of(text))
    if is_url(text):
        raise NotLocal(
            f"{text}: found a url, expected a path of this machine, since nothing else is read or "
            "written here. Name a local folder, and copy its files from or to the url yourself"
        )
    return Path(home(text))


def place(word: Any) -> Any:
    """Returns a path or url from a typed word, with the home folder written out; NotLocal where a url
    holds what must not be written down.
    """
    if isinstance(word, str) and is_url(word) and redacted(word) != word:
        raise NotLocal(
            f"{redacted(word)}: found a user, password or query in the url, which would be written "
            "down. Leave it out, and give credentials in the environment"
        )
    return home(word) if isinstance(word, str) else word


def model(word: Any) -> Any:
    """Returns a model's hub id, its name or its folder from a typed word; NotLocal for a url."""
    return (
        str(local_path(word))
        if isinstance(word, str) and (is_url(word) or word[:1] == "~")
        else word
    )
