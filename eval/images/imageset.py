"""A folder of generated pictures that knows what made it.

    <save_dir>/manifest.json      the settings; when all pictures are there, their sha256 too
    <save_dir>/prompts.json       the prompts, in their order
    <save_dir>/images/            the files of the benchmark's layout, for its official scorer
    <save_dir>/removed.json       where `eval study gc` removed pictures that are scored: which are left
    <save_dir>/scores/            what scorers say (`eval.scores.results`)
    <save_dir>/halves/a|b/        likewise of a half of the prompts (`eval.sweep`)

Each file is written whole or not at all, with a digest of settings, id and prompt in it, which
makes it verifiable alone: an interrupted run goes on from the files that exist.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from shards import atomic_write, canonical_json, put_if_absent, sha256, sha256_file

from ..errors import MissingImages, OtherImages
from ..prompts.prompts import Half, Prompts
from . import checks, embedded_digest
from .layouts import LAYOUTS, File, Picture, joined, parted

HALVES = "halves"  # folder of what is said of a half of the prompts
STALE_SECONDS = 3600  # unfinished files so old are of killed processes

Json = dict[str, Any]


class ImageSetWriter:
    """Pictures of one list of prompts under one set of settings. Refuses a folder of other ones.

    Several processes may write one set: each file is put where it belongs at once or not at all,
    the first of two that make the same one wins, and any of them may call `finish`.
    """

    def __init__(
        self, folder: Path, prompts: Prompts, settings: Json, layout: str = "flat", count: int = 1
    ) -> None:
        self.folder, self.images = folder, folder / "images"
        self.files = LAYOUTS[layout].files(prompts, count)
        self._manifest = folder / "manifest.json"
        self._sidecars = LAYOUTS[layout].sidecars(prompts)
        suffix = PurePosixPath(self.files[0].path).suffix
        self._settings = settings | {
            "benchmark": prompts.benchmark, "prompts": prompts.digest, "layout": layout, "images_per_prompt": count,
            "encoding": embedded_digest.ENCODINGS[suffix],
        }  # fmt: skip
        if self._manifest.exists():  # before its pictures are taken for strangers
            self._refuse_others()
        checks.refuse_strangers(
            self.images, {file.path for file in self.files} | self._sidecars.keys()
        )
        self.images.mkdir(parents=True, exist_ok=True)
        put_if_absent(self._manifest, self._record({"complete": False}))
        self._recorded = self._refuse_others()
        beside = {f"images/{path}": data for path, data in self._sidecars.items()}
        for path, data in {"prompts.json": canonical_json(prompts.to_json()), **beside}.items():
            if not (folder / path).exists():
                self._put(folder / path, data)
        checks.read_set_prompts(folder / "prompts.json", self._settings)
        checks.refuse_sidecars(self.images, self._sidecars)

    def has(self, file: File) -> bool:
        """Whether a file exists; OtherImages if it is of other settings, or damaged."""
        path = self.images / file.path
        if not path.exists():
            return False
        embedded_digest.check(path, file_digest(self._settings, file))
        return True

    def save(self, file: File, tiles: Sequence[Picture]) -> None:
        """Writes a file's pictures (H, W, 3); OtherImages if a complete set has another."""
        suffix = PurePosixPath(file.path).suffix
        data = embedded_digest.encode(joined(tiles), suffix, file_digest(self._settings, file))
        checks.refuse_remade(self.images / file.path, sha256(data), file.path, self._recorded)
        self._put(self.images / file.path, data)

    def finish(self, provenance: Json) -> Json:
        """Records the digests of all files, or checks those recorded; returns the manifest.

        Raises MissingImages where files are absent. Two processes that finish at once record the
        same.
        """
        checks.refuse_missing(self.folder, self.files)
        for temporary in self.folder.glob(".tmp-*"):
            with suppress(FileNotFoundError):  # another process's, and now finished
                if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                    temporary.unlink()
        files = {file.path: sha256_file(self.images / file.path) for file in self.files}
        recorded = checks.read_manifest(self._manifest)
        if recorded["complete"]:
            checks.refuse_changed(self.images, files, recorded["files"])
            (self.folder / checks.REMOVED).unlink(missing_ok=True)  # they were made again
            return recorded
        state = {"complete": True, "files": files, "provenance": provenance}
        atomic_write(self._manifest, self._record(state))
        self._recorded = checks.read_manifest(self._manifest)
        return self._recorded

    def _put(self, path: Path, data: bytes) -> None:
        """Unfinished files are outside of images/: scorers take all they find there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        put_if_absent(path, data, self.folder)

    def _record(self, state: Json) -> bytes:
        return canonical_json(
            {"format": checks.FORMAT, "version": checks.VERSION, "settings": self._settings} | state
        )

    def _refuse_others(self) -> Json:
        """Returns the manifest; OtherImages if it is of other settings."""
        from train.checkpoints.identity import differing  # loads torch

        recorded = checks.read_manifest(self._manifest)
        wanted = json.loads(canonical_json(self._settings))
        differ = differing(recorded["settings"], wanted)
        if lines := [checks.difference_text(key, *values) for key, values in differ.items()]:
            problem = f"{self.folder} holds images of other settings:"
            remedy = "Choose another --save_dir, or the settings of before"
            raise OtherImages("\n  ".join([problem, *lines, remedy]))
        return recorded


def file_digest(settings: Json, file: File) -> str:
    """Returns the digest that a file of these settings carries."""
    return sha256(canonical_json([settings, file.path, file.prompt.text, file.numbers]))


@dataclass(frozen=True, slots=True)
class PictureRef:
    """One picture of a finished set."""

    file: File
    number: int  # of its prompt's pictures
    path: Path
    tile: int | None  # where the file is a grid

    def read(self) -> Picture:
        """Returns its pixels (H, W, 3), 8-bit RGB."""
        with Image.open(self.path) as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels if self.tile is None else parted(pixels, len(self.file.numbers))[self.tile]


@dataclass(frozen=True)
class ImageSetReader:
    """A finished set of pictures, for scorers."""

    folder: Path  # the save_dir
    prompts: Prompts
    settings: Json
    files: list[File]
    digests: dict[str, str]  # of each file
    images: Path  # the folder of the files
    missing: int = 0  # files that are absent
    removed: int = 0  # files that are, since they were removed on purpose once they were scored
    half: Half | None = None  # of the prompts, where it is not of all of them

    @classmethod
    def open(cls, save_dir: Path, partial: bool = False, scored: bool = False) -> ImageSetReader:
        """Opens a set whose files are all there, are those recorded, and are alone.

        With `partial` the files that exist are taken, and `missing` counts the others. With `scored`
        those that were removed on purpose may be absent: `removed` counts them, and the digest is that
        of the whole set. Raises MissingImages, which lists what is missing, and OtherImages.
        """
        manifest = save_dir / "manifest.json"
        if not manifest.exists():
            raise MissingImages(
                f"{save_dir}: found no manifest.json, expected a folder that `python -m eval generate` made"
            )
        recorded = checks.read_manifest(manifest)
        settings = recorded["settings"]
        prompts = checks.read_set_prompts(save_dir / "prompts.json", settings)
        layout, images = LAYOUTS[settings["layout"]], save_dir / "images"
        files = layout.files(prompts, settings["images_per_prompt"])
        sidecars = layout.sidecars(prompts)
        unneeded = checks.removed_files(save_dir, recorded)
        gone = {
            file.path
            for file in files
            if file.path in unneeded and not (images / file.path).is_file()
        }
        if not partial:
            if not scored:
                checks.refuse_removed(save_dir, sorted(gone))
            checks.refuse_missing(
                save_dir, [file for file in files if file.path not in gone], recorded["complete"]
            )
        checks.refuse_strangers(images, {file.path for file in files} | sidecars.keys())
        checks.refuse_sidecars(images, sidecars)
        present = [file for file in files if (images / file.path).is_file()]
        digests = {file.path: sha256_file(images / file.path) for file in present}
        if recorded["complete"]:
            checks.refuse_changed(images, digests, recorded["files"])
        else:
            for file in present:
                embedded_digest.check(images / file.path, file_digest(settings, file))
        removed = gone if scored else set()
        digests |= {path: recorded["files"][path] for path in removed}
        absent, half = len(files) - len(present) - len(removed), settings.get("half")
        return cls(
            save_dir, prompts, settings, present, digests, images, absent, len(removed), half
        )

    def half_of(self, half: Half) -> ImageSetReader:
        """Returns the pictures of a half of the prompts; what is kept beside them has a folder of its
        own. OtherImages where the set itself is of a half.
        """
        if self.half:
            raise OtherImages(
                f"{self.folder}: found pictures of half {self.half} of the prompts, expected those of all"
            )
        prompts = self.prompts.half(half)
        layout, count = LAYOUTS[self.settings["layout"]], self.settings["images_per_prompt"]
        paths = {file.path for file in layout.files(prompts, count)}  # also of files that are gone
        files = [file for file in self.files if file.path in paths]
        digests = {path: digest for path, digest in self.digests.items() if path in paths}
        return replace(
            self, folder=self.folder / HALVES / half, half=half, prompts=prompts, files=files,
            settings={**self.settings, "half": half}, digests=digests,
            missing=len(paths) - len(digests), removed=len(digests) - len(files),
        )  # fmt: skip

    @property
    def count(self) -> int:
        """How many pictures its scores are of: also those that were removed since."""
        if self.removed:
            return len(self.prompts.items) * int(self.settings["images_per_prompt"])
        return sum(len(file.numbers) for file in self.files)

    @property
    def missing_pictures(self) -> int:
        """How many pictures the absent files would show, of which a grid has several."""
        return self.missing * (len(self.files[0].numbers) if self.files else 1)

    @property
    def digest(self) -> str:
        """Of settings and all files: what a score is of."""
        return sha256(canonical_json([self.settings, self.digests]))

    def __iter__(self) -> Iterator[PictureRef]:
        """Yields pictures in the order of the prompts."""
        for file in self.files:
            for i, number in enumerate(file.numbers):
                tile = None if len(file.numbers) == 1 else i
                yield PictureRef(file, number, self.images / file.path, tile)
