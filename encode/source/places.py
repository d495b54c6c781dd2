"""Where a source's tars are: from what a config names to paths and urls, in order.

    data/sa_{000000..000999}.tar       s3://bucket/{00..31}.tar      https://server/path/{0..9}.tar
    data/*.tar                         s3://bucket/set/*.tar         data/tars/

What a pattern finds is sorted by its names, 9.tar before 10.tar, and is the same source as the same
tars named one by one.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from braceexpand import braceexpand

from shards import open_store
from shards.places import home, local_path
from shards.store import WEB, Limits

from ..errors import NotASource

TAR = ".tar"
MEANING = set("{}\\")  # characters that have one in a brace pattern
LOOKING = Limits(give_up=60)


def expand(tars: str | Sequence[str]) -> list[str]:
    """Returns a source's places in order, from brace patterns such as `data/{000..009}.tar`. A path that
    exists is none, whatever is in its name. NotASource for a brace without its other half.
    """
    patterns = [tars] if isinstance(tars, str) else list(tars)
    return [home(place) for pattern in patterns for place in _of_braces(pattern)]


def _of_braces(pattern: str) -> list[str]:
    if not MEANING & set(pattern):
        return [pattern]
    if not is_url(pattern) and os.path.exists(local_path(pattern)):
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError:  # its UnbalancedBracesError, which its types do not name
        raise NotASource(
            f"{pattern}: found no such path, and a brace without its other half. Expected a pattern as "
            "a/{000..999}.tar"
        ) from None


def listed(tars: str | Sequence[str]) -> list[str]:
    """Returns a source's tars in order: braces expanded, then what each `*` and each folder holds.

    A pattern that finds nothing stays as it is, and is then a tar that does not exist. NotASource
    for a folder without tars, or a pattern where nothing can be listed.
    """
    return [tar for place in expand(tars) for tar in _at(place)]


def _at(place: str) -> list[str]:
    if is_url(place):
        return _of_store(place) if "*" in place.rpartition("/")[2] else [place]
    path = local_path(place)
    if path.is_dir():
        return _of_folder(place, path)
    if path.exists() or not glob.has_magic(str(path)):
        return [place]
    files = [name for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    return sorted(files, key=natural) or [place]


def _of_folder(place: str, folder: Path) -> list[str]:
    if tars := tars_in(folder):
        return [str(tar) for tar in tars]
    raise NotASource(
        f"{place}: a folder without tars. Name the tars, as in {place.rstrip('/')}/**/*.tar for those "
        "in folders below it. A folder of pictures is packed by `python -m encode pack`, or by "
        "`python -m encode run` where it is all of a source"
    )


def tars_in(folder: Path) -> list[Path]:
    """Returns the tars of a folder, not of those below it, sorted by their names."""
    tars = [
        path for path in folder.iterdir()
        if path.suffix.lower() == TAR and not path.name.startswith(".") and path.is_file()
    ]  # fmt: skip
    return sorted(tars, key=lambda path: natural(path.name))


def _of_store(url: str) -> list[str]:
    """Returns the objects of an object store's folder whose names a pattern fits."""
    folder, _, pattern = url.rpartition("/")
    if url.partition("://")[0] in WEB:
        raise NotASource(
            f"{url}: a web server does not list its files. Name them, as in {folder}/{{000..099}}.tar"
        )
    names = [name for name, _ in open_store(folder, LOOKING).list() if "/" not in name]
    tars = [f"{folder}/{name}" for name in names if fnmatchcase(name, pattern)]
    return sorted(tars, key=natural) or [url]


def natural(text: str) -> tuple[list[tuple[int, str]], str]:
    """Returns a key that sorts runs of digits as numbers: 9.tar before 10.tar."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)], text


def is_url(place: str) -> bool:
    """Returns whether a tar has to be fetched."""
    return "://" in place and not place.startswith("file://")


def split_url(url: str) -> tuple[str, str]:
    """Returns the url of the store that a tar is in, and its name there."""
    folder, _, name = url.rpartition("/")
    web = url.partition("://")[0] in WEB
    if not name or folder.endswith("/"):
        raise NotASource(
            f"{url}: found no file's name, or empty parts. Name each tar in full, or *.tar in an "
            "object store"
        )
    if web and ("?" in url or "#" in url):
        open_store(url)  # says why not
    return folder, unquote(name) if web else name


def base_name(place: str) -> str:
    """Returns the name that a source knows a tar by: the last part of its path."""
    return split_url(place)[1] if is_url(place) else str(local_path(place).name)
