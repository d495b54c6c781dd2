"""Features of many pictures, kept beside them, so that another score of the same pictures is cheap.

    <save_dir>/features/<network>-<weights>-<crop>/00000.safetensors    1,024 pictures each

A block carries the digests of its pictures and of what made it: one that agrees is reused, any
other is made again, and an interrupted pass goes on after the blocks that exist. Pictures are read
ahead by threads; memory holds two batches of pictures, and the features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import escape, glob
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
from shards.read import map_ahead

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
    """Pictures in their order, each with its file's digest, and its name for messages."""

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
    """Returns all pictures of a finished set; MissingImages if there are none."""
    pictures = list(images)
    if not pictures:
        raise MissingImages(f"{images.folder}: found no picture, expected at least one")
    tiles = ["" if picture.tile is None else f"/{picture.tile}" for picture in pictures]
    return Pictures(
        [str(picture.path) for picture in pictures],
        [images.digests[p.file.path] + tile for p, tile in zip(pictures, tiles, strict=True)],
        lambda i: pictures[i].read(),
        [picture.file.prompt.group for picture in pictures],
    )


def of_folder(folder: Path) -> Pictures:
    """Returns all pictures below a folder in clean-fid's order, grouped by top folder."""
    paths = clean_listing(folder)
    parts = [path.relative_to(folder).parts for path in paths]
    return Pictures(
        [str(path) for path in paths],
        [sha256_file(path) for path in paths],
        lambda i: read_picture(paths[i]),
        [names[0] if len(names) > 1 else None for names in parts],
    )


def clean_listing(folder: Path) -> list[Path]:
    """Returns the files that clean-fid takes below a folder, in order; TooFewImages under two."""
    from cleanfid.utils import EXTENSIONS

    if not folder.is_dir():
        raise TooFewImages(f"{folder}: no such folder. Expected one with pictures")
    patterns = [f"{escape(str(folder))}/**/*.{extension}" for extension in EXTENSIONS]
    paths = sorted(path for pattern in patterns for path in glob(pattern, recursive=True))
    if len(paths) < 2:
        raise TooFewImages(f"{folder}: found {len(paths)} pictures, expected at least 2")
    return [Path(path) for path in paths]


def read_picture(path: Path) -> Picture:
    """Returns a picture as clean-fid reads it: a .npy file's array, else (H, W, 3) RGB."""
    if path.suffix == ".npy":
        array = np.asarray(np.load(path))
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"found the shape {array.shape}, expected (height, width, 3)")
        return array
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def extract(
    pictures: Pictures,
    network: Network,
    cut: str = "none",
    folder: Path | None = None,
    batch_size: int = 32,
) -> Floats:
    """Returns features (N, width) fp32 after the crop `cut`; blocks are kept in `folder`.

    Raises BadPicture, which names the file, where one cannot be read, NotFinite where a feature is
    not.
    """
    made_by = canonical_json(identity(network, cut)).decode()
    blocks: list[Floats] = []
    with (
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
        Bar(network.name, len(pictures), "pictures") as bar,
    ):
        for start in range(0, len(pictures), BLOCK):
            numbers = range(start, min(start + BLOCK, len(pictures)))
            digest = sha256(canonical_json(pictures.digests[start : numbers.stop]))
            record = {"made_by": made_by, "pictures": digest}
            path = folder / f"{start // BLOCK:05d}.safetensors" if folder else None
            block = _kept(path, record)
            if block is None:
                block = _run(pictures, numbers, network, cut, batch_size, pool, bar)
                if path:
                    atomic_write(path, save({"features": block}, record))
            else:
                bar.skip(len(block))
            blocks.append(block)
    return np.concatenate(blocks)


def identity(network: Network, cut: str) -> Json:
    """Returns what makes features comparable: those of two sets must agree in all of it."""
    weights, resize = network.weights, network.resize
    return {"network": network.name, "weights": weights, "resize": resize, "crop": cut}


def folder_of(save_dir: Path, network: Network, cut: str) -> Path:
    """Returns where the features of a set are kept."""
    return save_dir / NAME / f"{network.name}-{network.weights[:8]}-{network.resize}-{cut}"


def _kept(path: Path | None, record: dict[str, str]) -> Floats | None:
    """Returns the features of a block that is complete and of these pictures."""
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            features = np.asarray(file.get_tensor("features"))
            whole = file.metadata() == record and bool(np.isfinite(features).all())
            return features if whole else None
    except SafetensorError:
        return None  # cut off by a full disk; made again


def _run(
    pictures: Pictures, numbers: range, network: Network, cut: str, batch_size: int,
    pool: ThreadPoolExecutor, bar: Bar,
) -> Floats:  # fmt: skip
    import torch

    cropped = crop(cut)

    def prepared(i: int) -> Tensor:
        try:
            return network.prepare(cropped(pictures.read(i)))
        except (
            OSError, EOFError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError,
        ) as error:  # of broken files  # fmt: skip
            raise BadPicture(
                f"{pictures.names[i]}: cannot be read as a picture ({error}). Restore it, or take it away"
            ) from None

    rows = []
    tensors = map_ahead(pool, prepared, numbers, AHEAD * batch_size)
    while part := list(islice(tensors, batch_size)):
        with torch.inference_mode():
            pixels = torch.stack(part).to(network.device)
            rows.append(network.features(pixels).float().cpu())
        bar.advance(len(part))
    features = torch.cat(rows).numpy()
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise NotFinite(
            f"{pictures.names[numbers[bad[0]]]}: found NaN or infinity in the features that {network.name} "
            f"makes of it, and of {len(bad) - 1} others, expected finite numbers. Look at the weights"
        )
    return features
