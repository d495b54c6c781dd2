"""A folder of generated pictures that knows what made it.

    <save_dir>/manifest.json      the settings; when all pictures are there, their sha256 too
    <save_dir>/images/<id>.png    written whole or not at all, stamped with settings, id and prompt

A stamp makes a picture verifiable alone, so an interrupted run goes on from the pictures that stand.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from shards import atomic_write, canonical_json, put_if_absent, sha256, sha256_file

from .errors import OtherImages
from .prompts import Prompts

FORMAT, VERSION = "latentbank-images", 1
STAMP = "latentbank"

Json = dict[str, Any]


class ImageSet:
    """Pictures of one list of prompts under one set of settings. Opening refuses a folder of other ones."""

    def __init__(self, folder: Path, prompts: Prompts, settings: Json) -> None:
        self.images, self._manifest = folder / "images", folder / "manifest.json"
        self._ids = dict(prompts.items)
        self._settings = settings | {"benchmark": prompts.benchmark, "prompts": prompts.digest}
        self.images.mkdir(parents=True, exist_ok=True)
        self._refuse_strangers()
        self._refuse_others()

    def has(self, name: str) -> bool:
        """Whether this picture stands; one that these settings did not make is refused."""
        path = self._path(name)
        if not path.exists():
            return False
        try:
            with Image.open(path) as image:
                stamp = image.info.get(STAMP)
                image.verify()  # the CRC of every chunk, to the end
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise OtherImages(f"{path}: unreadable ({error}). Delete it to make it again") from None
        if stamp != self._stamp(name):
            raise OtherImages(
                f"{path}: not made by this run's settings and prompt. Move it away, or choose another --save_dir"
            )
        return True

    def save(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Write a picture (H, W, 3)."""
        info, file = PngImagePlugin.PngInfo(), io.BytesIO()
        info.add_text(STAMP, self._stamp(name))
        Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
        put_if_absent(self._path(name), file.getvalue())

    def finish(self, provenance: Json) -> Json:
        """Record the digests of all pictures, or check them where they are recorded already."""
        files = {name: sha256_file(self._path(name)) for name in self._ids}
        recorded = self._standing()
        if not recorded.get("complete"):
            return self._write({"complete": True, "files": files, "provenance": provenance})
        changed = [name for name in files if files[name] != recorded["files"].get(name)]
        if changed:
            raise OtherImages(
                f"{self.images}: {len(changed)} pictures changed since {self._manifest.name} was written "
                f"({', '.join(changed[:5])}). Restore them, or make the whole set again in another folder"
            )
        return recorded

    def _path(self, name: str) -> Path:
        return self.images / f"{name}.png"

    def _stamp(self, name: str) -> str:
        return sha256(canonical_json([self._settings, name, self._ids[name]]))

    def _write(self, state: Json) -> Json:
        manifest = {"format": FORMAT, "version": VERSION, "settings": self._settings} | state
        atomic_write(self._manifest, canonical_json(manifest))
        return manifest

    def _standing(self) -> Json:
        """The manifest that stands; without one, an incomplete one of these settings."""
        if not self._manifest.exists():
            return self._write({"complete": False})
        try:
            found = json.loads(self._manifest.read_bytes())
            if found["format"] == FORMAT and found["version"] == VERSION and found["settings"]:
                return dict(found)
        except (ValueError, KeyError, TypeError):
            pass
        raise OtherImages(
            f"{self._manifest}: not a manifest of images, version {VERSION}. Choose another folder"
        )

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
        known = {f"{name}.png" for name in self._ids}
        strangers = sorted(p.name for p in self.images.iterdir() if p.name not in known)
        strangers = [name for name in strangers if not name.startswith(".tmp-")]
        if strangers:
            raise OtherImages(
                f"{self.images}: found {len(strangers)} files that no prompt asks for ({', '.join(strangers[:5])}). "
                "A scorer would count them: move them away"
            )
