"""Where the benchmarks' prompt files come from, and how one is made where none is published."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shards import sha256

from ..errors import BadPrompts

COCO_PROMPTS = 30_000


@dataclass(frozen=True, slots=True)
class Source:
    """A file that `prompts fetch` brings."""

    # its name on this machine
    file: str
    url: str
    # of the file, where one is known; else it is recorded when first fetched
    sha256: str | None = None
    # makes the file of what was downloaded, where that is not the file itself
    make: Callable[[Path], bytes] | None = None
    terms: str = ""  # of its licence, in a line


def github(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


def hub(dataset: str, revision: str, path: str) -> str:
    """Returns the url of a data set's file on the hub, or on the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{dataset}/resolve/{revision}/{path}"


def texts_of(folder: str) -> Callable[[Path], bytes]:
    """Returns what makes JSON {name: text} of a folder's .txt files in a repository's .tar.gz."""

    def make(archive: Path) -> bytes:
        texts = {}
        with opening(archive), tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)  # repository-commit/folder/name
                below = PurePosixPath(*path.parts[1:-1])
                if member.isfile() and str(below) == folder and path.suffix == ".txt":
                    file = tar.extractfile(member)
                    assert file is not None
                    texts[path.name.removesuffix(".txt")] = file.read().decode().strip()
        return json.dumps(texts, ensure_ascii=False, indent=0, sort_keys=True).encode()

    return make


def coco_captions(archive: Path) -> bytes:
    """Returns 30,000 captions of val2014 as CSV, of 30,000 pictures, from COCO's annotations.

    Nobody published the one list, so this one is drawn such that everybody draws the same: each
    caption has the rank sha256("coco30k <caption id>"); a picture's caption is its lowest, and the
    30,000 pictures with the lowest are taken. Rows are sorted by caption id.
    """
    with opening(archive), zipfile.ZipFile(archive) as files:
        captions = json.loads(files.read("annotations/captions_val2014.json"))["annotations"]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "image_id", "caption"])
    for caption in draw(captions, COCO_PROMPTS):  # some captions end with a line break
        rows.writerow([caption["id"], caption["image_id"], " ".join(caption["caption"].split())])
    return text.getvalue().encode()


def draw(captions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns a caption each of `count` pictures, sorted by caption id."""
    by_rank = sorted(captions, key=lambda caption: sha256(f"coco30k {caption['id']}".encode()))
    lowest: dict[int, dict[str, Any]] = {}
    for caption in by_rank:
        lowest.setdefault(caption["image_id"], caption)
    return sorted(list(lowest.values())[:count], key=lambda caption: int(caption["id"]))


@contextmanager
def opening(archive: Path) -> Iterator[None]:
    """Raises BadPrompts for a file that is no archive, or not the expected one."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError, ValueError, OSError) as error:
        raise BadPrompts(
            f"{archive}: not the archive that was expected ({error}). If it stays so, its publisher changed it: bring "
            "the prompts yourself and name them with --prompts"
        ) from None
