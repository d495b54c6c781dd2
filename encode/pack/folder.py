"""A folder of pictures, each with its caption beside it: 0001.jpg and 0001.txt, .caption or .json."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ..source.members import PICTURES
from .listing import CAPTIONS, JSON, Inside, Listing, status_of, suffix_of


def list_folder(listing: Listing, tables: Collection[Path] = (), rank: int = 0) -> None:
    """Adds every picture below the listing's folder, with the caption files of its name. What is
    hidden, and `tables`, are passed over; links to folders are not followed.
    """
    inside = Inside(listing.source.folder)
    for folder, names in walk(inside, listing):
        _list_names(listing, inside, folder, [n for n in names if folder / n not in tables], rank)


def walk(inside: Inside, listing: Listing) -> Iterator[tuple[Path, list[str]]]:
    """Yields every folder below one with the names of its files, sorted."""
    source, folders = listing.source, [inside.folder]
    while folders:
        folder, names, below = folders.pop(), list[str](), list[Path]()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            source.troubles.add("unreadable", error)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append(folder / entry.name)
            elif entry.is_symlink() and entry.is_dir():
                source.troubles.add("outside", f"{entry.path} (a link to a folder)")
            else:
                names.append(entry.name)
        yield folder, names
        folders += reversed(below)


def _list_names(
    listing: Listing, inside: Inside, folder: Path, names: list[str], rank: int
) -> None:
    """Adds the pictures of one folder; the captions that are of none are counted."""
    source, files, pictures = listing.source, dict[str, dict[str, str]](), list[str]()
    for name in names:
        suffix = suffix_of(name)
        if suffix in PICTURES:
            pictures.append(name)
        elif suffix in CAPTIONS or suffix == JSON:
            files.setdefault(name.rpartition(".")[0], {})[suffix] = name
        else:
            source.others[suffix or "none"] += 1
    stems, start = set(), f"{os.path.relpath(folder, inside.folder)}/".removeprefix("./")
    for name in pictures:
        stem = name.rpartition(".")[0]
        captions = files.get(name) or files.get(stem) or {}  # also 0001.jpg.txt
        stems |= {name, stem}
        try:
            picture = _inside(inside, start + name)
            status = status_of(inside.full(picture))
            caption = next((captions[suffix] for suffix in CAPTIONS if suffix in captions), None)
            fields = captions.get(JSON)
            paths = [
                None if file is None else _inside(inside, start + file)
                for file in (caption, fields)
            ]
            times = [status_of(inside.full(path)).st_mtime_ns for path in paths if path]
        except LookupError as error:
            source.troubles.add("outside", error.args[0])
        except OSError as error:
            source.troubles.add("unreadable", error)
        else:
            listing.add(picture, status, paths[0], sum(times), fields=paths[1], rank=rank)
    for stem, captions in files.items():
        if stem in stems:
            continue
        for suffix, name in captions.items():
            if suffix == JSON and name.endswith("_stats.json"):  # of img2dataset
                source.others[suffix] += 1
            else:
                source.troubles.add("caption_without_picture", folder / name)


def _inside(inside: Inside, name: str) -> str:
    """Returns a name in the folder if its file is there, or a link to one; LookupError if it is not."""
    if inside.path(name) is None:
        raise LookupError(inside.full(name))
    return name
