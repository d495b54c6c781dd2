"""Features of many pictures, kept beside them, so that another score of the same pictures is cheap.

    <save_dir>/features/<network>-<weights>-<crop>/00000.safetensors    1,024 pictures each, in the order of the files

A block carries the digests of its pictures and of what made it: one that agrees is reused, any other is made again,
and an interrupted pass goes on behind the blocks that stand. Pictures are read ahead by threads; memory holds two
batches of pictures, and the features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shards import atomic_write, canonical_json, sha256, sha256_file
from shards.console import Bar
from shards.read.prefetch import map_ahead

from ..errors import BadPicture, MissingImages, NotFinite, TooFewImages
from ..images.imageset import ImageSetReader
from ..images.layouts import Picture
from .crops import crop

if TYPE_CHECKING:
    from torch import Tensor

    from .networks import Network

NAME = "features"
BLOCK = 1_024
AHEAD = 2  # batches that are read while the network runs
THREADS = 8

Json = dict[str, Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Pictures in their order, each with the digest of its file, and its name for messages."""

    names: list[str]
    digests: list[str]
    read: Callable[[int], Picture]
    groups: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """Of the contents and their order."""
        return sha256(canonical_json(self.digests))


def of_set(images: ImageSetReader) -> Pictures:
    """All pictures of a finished set, in the order of its prompts; MissingImages if there are none."""
    ones = list(images)
    if not ones:
        raise MissingImages(f"{images.folder}: found no picture, expected at least one")
    return Pictures(
        [str(one.path) for one in ones],
        [
            images.digests[one.file.path] + ("" if one.tile is None else f"/{one.tile}")
            for one in ones
        ],
        lambda i: ones[i].read(),
        [one.file.prompt.group for one in ones],
    )


def of_folder(folder: Path) -> Pictures:
    """All pictures below a folder: clean-fid's list and order. A picture's group is its top folder."""
    paths = clean_listing(folder)
    groups = [path.relative_to(folder).parts[0] for path in paths]
    return Pictures(
        [str(path) for path in paths],
        [sha256_file(path) for path in paths],
        lambda i: read_picture(paths[i]),
        [None if paths[i] == folder / groups[i] else groups[i] for i in range(len(paths))],
    )


def clean_listing(folder: Path) -> list[Path]:
    """The files that clean-fid takes below a folder, in its order; TooFewImages without two of them."""
    from glob import escape, glob

    from cleanfid.utils import EXTENSIONS

    if not folder.is_dir():
        raise TooFewImages(f"{folder}: no such folder. Expected one with pictures")
    found = sorted(
        path
        for extension in EXTENSIONS
        for path in glob(f"{escape(str(folder))}/**/*.{extension}", recursive=True)
    )
    if len(found) < 2:
        raise TooFewImages(f"{folder}: found {len(found)} pictures, expected at least 2")
    return [Path(path) for path in found]


def read_picture(path: Path) -> Picture:
    """As clean-fid reads it: an array of a .npy file, else (H, W, 3) RGB whatever the file's own colours."""
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def extract(
    pictures: Pictures,
    network: Network,
    cut: str = "none",
    kept: Path | None = None,
    batch_size: int = 32,
) -> Floats:
    """Features (N, width) fp32 of all pictures, after the crop of this name; `kept` is the folder of blocks.

    Raises BadPicture, which names the file, where one cannot be read.
    """
    made_by = identity(network, cut)
    blocks: list[Floats] = []
    with (
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
        Bar(network.name, len(pictures), "pictures") as bar,
    ):
        for start in range(0, len(pictures), BLOCK):
            numbers = range(start, min(start + BLOCK, len(pictures)))
            told = {
                "made_by": canonical_json(made_by).decode(),
                "pictures": sha256(canonical_json(pictures.digests[start : numbers.stop])),
            }
            path = kept / f"{start // BLOCK:05d}.safetensors" if kept else None
            block = _standing(path, told)
            if block is None:
                block = _run(pictures, numbers, network, cut, batch_size, pool, bar)
                if path:
                    atomic_write(path, save({"features": block}, told))
            else:
                bar.skip(len(block))
            blocks.append(block)
    return np.concatenate(blocks)


def identity(network: Network, cut: str) -> Json:
    """What makes features comparable: those of two sets must agree in all of it."""
    return {
        "network": network.name,
        "weights": network.weights,
        "resize": network.resize,
        "crop": cut,
    }


def folder_of(save_dir: Path, network: Network, cut: str) -> Path:
    """Where the features of a set are kept."""
    return save_dir / NAME / f"{network.name}-{network.weights[:8]}-{network.resize}-{cut}"


def _standing(path: Path | None, told: dict[str, str]) -> Floats | None:
    """The features of a block that is whole and of these pictures."""
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            return np.asarray(file.get_tensor("features")) if file.metadata() == told else None
    except SafetensorError:
        return None  # cut off by a disk; made again


def _run(
    pictures: Pictures,
    numbers: range,
    network: Network,
    cut: str,
    batch_size: int,
    pool: ThreadPoolExecutor,
    bar: Bar,
) -> Floats:
    import torch

    act = crop(cut)

    def prepared(i: int) -> Tensor:
        try:
            picture = act(pictures.read(i))
        except (
            OSError,
            ValueError,
            TypeError,
            SyntaxError,
        ) as error:  # PIL's and numpy's of broken files
            raise BadPicture(
                f"{pictures.names[i]}: cannot be read as a picture ({error}). Restore it, or take it away"
            ) from None
        return network.prepare(picture)

    found = []
    tensors = map_ahead(pool, prepared, numbers, AHEAD * batch_size)
    while batch_tensors := list(islice(tensors, batch_size)):
        batch = torch.stack(batch_tensors)
        with torch.inference_mode():
            found.append(network.features(batch.to(network.device)).float().cpu())
        bar.advance(len(batch))
    features = torch.cat(found).numpy()
    strange = np.flatnonzero(~np.isfinite(features).all(1))
    if len(strange):
        raise NotFinite(
            f"{pictures.names[numbers[strange[0]]]}: found NaN or infinity in the features that {network.name} "
            f"makes of it, and of {len(strange) - 1} others, expected finite numbers. Look at the weights"
        )
    return features
