"""Where the benchmarks' prompt files come from, and how one is made where no such file is published."""

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

    file: str  # its name here
    url: str
    sha256: str | None = (
        None  # of the file here, where it is known; else it is recorded when first fetched
    )
    make: Callable[[Path], bytes] | None = (
        None  # of what was downloaded, where that is not the file itself
    )
    terms: str = ""  # whose it is, in a line


def github(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


def hub(dataset: str, revision: str, path: str) -> str:
    """A file of a data set on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{dataset}/resolve/{revision}/{path}"


def texts_of(folder: str) -> Callable[[Path], bytes]:
    """Of a .tar.gz of a repository: the .txt files of one of its folders as JSON {name: text}, sorted by name."""

    def make(archive: Path) -> bytes:
        found = {}
        with opening(archive), tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                below = PurePosixPath(
                    *path.parts[1:-1]
                )  # the first part is the repository's name and commit
                if member.isfile() and str(below) == folder and path.suffix == ".txt":
                    file = tar.extractfile(member)
                    assert file is not None
                    found[path.name.removesuffix(".txt")] = file.read().decode().strip()
        return json.dumps(found, ensure_ascii=False, indent=0, sort_keys=True).encode()

    return make


def coco_captions(archive: Path) -> bytes:
    """Of COCO's annotations: 30,000 captions of val2014 as CSV, of 30,000 pictures.

    Nobody published the one list, so this one is drawn such that everybody draws the same: each caption has the rank
    sha256("coco30k <caption id>"); a picture's caption is its lowest, and the 30,000 pictures with the lowest are
    taken. Rows are sorted by caption id.
    """
    with opening(archive), zipfile.ZipFile(archive) as files:
        every = json.loads(files.read("annotations/captions_val2014.json"))["annotations"]
    return csv_of(draw(every, COCO_PROMPTS))


def draw(captions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """A caption each of `count` pictures."""
    ranks: dict[int, tuple[str, dict[str, Any]]] = {}
    for caption in captions:
        ranked = sha256(f"coco30k {caption['id']}".encode()), caption
        ranks[caption["image_id"]] = min(ranks.get(caption["image_id"], ranked), ranked, key=rank)
    return sorted(
        (c for _, c in sorted(ranks.values(), key=rank)[:count]), key=lambda c: int(c["id"])
    )


def rank(ranked: tuple[str, dict[str, Any]]) -> str:
    return ranked[0]


def csv_of(captions: list[dict[str, Any]]) -> bytes:
    """id, image_id, caption; some of COCO's captions have line breaks at an end, which are left out."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "image_id", "caption"])
    rows.writerows([c["id"], c["image_id"], " ".join(c["caption"].split())] for c in captions)
    return text.getvalue().encode()


@contextmanager
def opening(archive: Path) -> Iterator[None]:
    """BadPrompts for an archive that is none, or not the one it should be."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError, ValueError, OSError) as error:
        raise BadPrompts(
            f"{archive}: not the archive that was expected ({error}). If it stays so, its publisher changed it: bring "
            "the prompts yourself and name them with --prompts"
        ) from None
