"""A folder of generated pictures that knows what made it.

    <save_dir>/manifest.json      the settings; when all pictures are there, their sha256 too
    <save_dir>/prompts.json       the prompts, in their order
    <save_dir>/images/            the files of the benchmark's layout, as its official scorer reads them
    <save_dir>/scores/            what scorers found (`eval.results`)

Each file is written whole or not at all and stamped with settings, id and prompt, which makes it verifiable alone: an
interrupted run goes on from the files that stand. `ImageSet` writes a set, `Images` reads a finished one.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from shards import atomic_write, canonical_json, put_if_absent, sha256, sha256_file

from .errors import MissingImages, OtherImages
from .layouts import LAYOUTS, File, Picture, joined, parted
from .prompts import Prompts

FORMAT, VERSION = "latentbank-images", 2
STAMP = "latentbank"
NAMED = 5  # of many files, how many an error names

Json = dict[str, Any]


class ImageSet:
    """Pictures of one list of prompts under one set of settings. Opening refuses a folder of other ones."""

    def __init__(
        self, folder: Path, prompts: Prompts, settings: Json, layout: str = "flat", count: int = 1
    ) -> None:
        self.folder, self.images = folder, folder / "images"
        self.files = LAYOUTS[layout].files(prompts, count)
        self._manifest = folder / "manifest.json"
        self._prompts, self._sidecars = prompts, LAYOUTS[layout].sidecars(prompts)
        self._settings = settings | {
            "benchmark": prompts.benchmark, "prompts": prompts.digest, "layout": layout, "images_per_prompt": count,
        }  # fmt: skip
        self.images.mkdir(parents=True, exist_ok=True)
        self._refuse_strangers()
        self._refuse_others()
        atomic_write(folder / "prompts.json", canonical_json(prompts.to_json()))
        for path, data in self._sidecars.items():
            (self.images / path).parent.mkdir(parents=True, exist_ok=True)
            put_if_absent(self.images / path, data)

    def has(self, file: File) -> bool:
        """Whether this file stands; one that these settings did not make is refused."""
        path = self.images / file.path
        if not path.exists():
            return False
        try:
            with Image.open(path) as image:
                stamp = image.info.get(STAMP) or image.info.get("comment", b"").decode()
                image.verify()  # of a PNG the CRC of every chunk, to the end
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise OtherImages(f"{path}: unreadable ({error}). Delete it to make it again") from None
        if stamp != self._stamp(file):
            raise OtherImages(
                f"{path}: not made by this run's settings and prompt. Move it away, or choose another --save_dir"
            )
        return True

    def save(self, file: File, tiles: Sequence[Picture]) -> None:
        """Write a file's pictures, each (H, W, 3)."""
        image, data = Image.fromarray(joined(tiles)), io.BytesIO()
        if file.path.endswith(".png"):
            info = PngImagePlugin.PngInfo()
            info.add_text(STAMP, self._stamp(file))
            image.save(data, "PNG", pnginfo=info)
        else:
            image.save(data, "JPEG", comment=self._stamp(file).encode())
        path = self.images / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        put_if_absent(path, data.getvalue())

    def finish(self, provenance: Json) -> Json:
        """Record the digests of all files, or check them where they are recorded already."""
        files = {file.path: sha256_file(self.images / file.path) for file in self.files}
        recorded = self._standing()
        if not recorded.get("complete"):
            return self._write({"complete": True, "files": files, "provenance": provenance})
        _refuse_changed(self.images, files, recorded["files"])
        return recorded

    def _stamp(self, file: File) -> str:
        told = [self._settings, file.path, file.prompt.text, file.numbers]
        return sha256(canonical_json(told))

    def _write(self, state: Json) -> Json:
        manifest = {"format": FORMAT, "version": VERSION, "settings": self._settings} | state
        atomic_write(self._manifest, canonical_json(manifest))
        return manifest

    def _standing(self) -> Json:
        """The manifest that stands; without one, an incomplete one of these settings."""
        if not self._manifest.exists():
            return self._write({"complete": False})
        return _read_manifest(self._manifest)

    def _refuse_others(self) -> None:
        found = self._standing()["settings"]
        lines = [
            f"{key}: found {found.get(key)!r}, expected {self._settings.get(key)!r}"
            for key in sorted(found.keys() | self._settings.keys())
            if found.get(key) != self._settings.get(key)
        ]
        if lines:
            remedy = "Choose another --save_dir, or the settings of before"
            what = f"{self._manifest.parent} holds images of other settings:"
            raise OtherImages("\n  ".join([what, *lines, remedy]))

    def _refuse_strangers(self) -> None:
        refuse_strangers(self.images, {file.path for file in self.files} | self._sidecars.keys())


@dataclass(frozen=True, slots=True)
class One:
    """One picture of a finished set."""

    file: File
    number: int  # of its prompt's pictures
    path: Path
    tile: int | None  # where the file is a grid

    def read(self) -> Picture:
        """Pixels (H, W, 3), 8-bit RGB."""
        with Image.open(self.path) as image:
            whole = np.asarray(image.convert("RGB"))
        if self.tile is None:
            return whole
        return parted(whole, len(self.file.numbers))[self.tile]


@dataclass(frozen=True)
class Images:
    """A finished set of pictures, for scorers."""

    folder: Path  # the save_dir
    prompts: Prompts
    settings: Json
    files: list[File]
    digests: dict[str, str]  # of each file
    missing: int = 0  # files that are not there

    @classmethod
    def open(cls, save_dir: Path, partial: bool = False) -> "Images":
        """Check that all files are there, are those recorded, and are alone.

        With `partial` the files that are there are taken, and `missing` counts the others. Raises MissingImages, which
        lists what is missing, and OtherImages.
        """
        manifest = save_dir / "manifest.json"
        if not manifest.exists():
            raise MissingImages(
                f"{save_dir}: found no manifest.json, expected a folder that `python -m eval generate` made"
            )
        recorded = _read_manifest(manifest)
        settings = recorded["settings"]
        prompts = _read_prompts(save_dir / "prompts.json", settings)
        layout = LAYOUTS[settings["layout"]]
        files = layout.files(prompts, settings["images_per_prompt"])
        images = save_dir / "images"
        absent = [file.path for file in files if not (images / file.path).is_file()]
        if not partial and (absent or not recorded["complete"]):
            named = ", ".join(absent[:NAMED])
            raise MissingImages(
                f"{save_dir}: {len(absent)} of {len(files)} files are missing ({named}). Run `python -m eval generate` "
                "with the same settings again: it makes what is missing"
            )
        refuse_strangers(images, {file.path for file in files} | layout.sidecars(prompts).keys())
        present = [file for file in files if file.path not in set(absent)]
        found = {file.path: sha256_file(images / file.path) for file in present}
        if recorded["complete"]:
            _refuse_changed(images, found, recorded["files"])
        return cls(save_dir, prompts, settings, present, found, len(absent))

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def digest(self) -> str:
        """Of settings and all files: what a score is of."""
        return sha256(canonical_json([self.settings, self.digests]))

    def __iter__(self) -> Iterator[One]:
        """Pictures in the order of the prompts."""
        for file in self.files:
            for tile, number in enumerate(file.numbers):
                whole = len(file.numbers) == 1
                yield One(file, number, self.images / file.path, None if whole else tile)


def refuse_strangers(images: Path, known: set[str]) -> None:
    """OtherImages where the folder holds a file that no prompt asks for; our unfinished ones are passed over."""
    found = (Path(at, name) for at, _, names in os.walk(images) for name in names)
    paths = sorted(path.relative_to(images) for path in found)
    strange = [p.as_posix() for p in paths if p.as_posix() not in known]
    strange = [path for path in strange if not Path(path).name.startswith(".tmp-")]
    if strange:
        raise OtherImages(
            f"{images}: found {len(strange)} files that no prompt asks for ({', '.join(strange[:NAMED])}). "
            "A scorer would count them: move them away"
        )


def _refuse_changed(images: Path, found: dict[str, str], recorded: dict[str, str]) -> None:
    changed = [path for path in found if found[path] != recorded.get(path)]
    if changed:
        raise OtherImages(
            f"{images}: {len(changed)} pictures changed since manifest.json was written "
            f"({', '.join(changed[:NAMED])}). Restore them, or make the whole set again in another folder"
        )


def _read_manifest(path: Path) -> Json:
    try:
        found = json.loads(path.read_bytes())
        if found["format"] == FORMAT and found["version"] == VERSION and found["settings"]:
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise OtherImages(f"{path}: not a manifest of images, version {VERSION}. Choose another folder")


def _read_prompts(path: Path, settings: Json) -> Prompts:
    try:
        prompts = Prompts.from_json(settings["benchmark"], json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise OtherImages(f"{path}: not a list of prompts ({error})") from None
    if prompts.digest != settings["prompts"]:
        raise OtherImages(f"{path}: changed since the pictures were made. Make the set again")
    return prompts
