"""What a column's VAE keeps of a picture: the posterior's mean decoded, beside the original crop.

    <save_dir>/original/images/<row id>.png          as the encoder saw it: decoded, resized, cropped
    <save_dir>/reconstruction/images/<row id>.png    from the column's rows, never from the picture
    <save_dir>/metrics.json                          PSNR and SSIM of each, and their means

The two image folders are what `python -m eval fid` takes for rFID.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode.images import to_images
from encode.vae import load_vae
from shards import Column, Status, atomic_write, canonical_json

from .errors import OtherImages, TooFewImages
from .generate import moved
from .imageset import ImageSet
from .originals import Originals, Picture
from .prompts import Prompt, Prompts

Json = dict[str, Any]


def reconstruct(
    column: Path,
    tars: Path,
    save_dir: Path,
    count: int = 64,
    batch_size: int = 32,
    vae: str | None = None,
    device: str = "cpu",
) -> Json:
    """Decode the first `count` valid rows of a moments or latents column; `tars` is the folder of its source's tars."""
    opened = Column.open(column)
    kind = opened.layout.kind
    if kind not in ("moments", "latents"):
        raise OtherImages(f"{column}: found a column of {kind}, expected one of moments or latents")
    identity = opened.spec.identity
    rows, keys, originals = read_originals(opened, tars, count)
    decoder = load_vae(moved(identity["encoder"], vae), device)
    asked = zip(map(name_of, rows), keys, strict=True)
    items = Prompts(column.name, tuple(Prompt(name, key) for name, key in asked))
    settings = {"column": opened.digest, "vae": decoder.weights}
    before, after = (
        ImageSet(save_dir / kind, items, settings | {"kind": kind})
        for kind in ("original", "reconstruction")
    )
    pictures: list[Json] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        stored = torch.from_numpy(opened.read(np.array(batch, np.int64), check=True)).float()
        latents = stored.chunk(2, 1)[0] if kind == "moments" else stored
        decoded = to_images(decoder.decode(latents))
        for i, (row, picture) in enumerate(zip(batch, decoded, strict=True), start):
            for images, pixels in ((before, originals[i]), (after, picture)):
                if not images.has(images.files[i]):
                    images.save(images.files[i], [pixels])
            scores = {"psnr": psnr(originals[i], picture), "ssim": ssim(originals[i], picture)}
            pictures.append({"row": row, "key": keys[i], **scores})
    for images in (before, after):
        images.finish({"device": device})
    mean = {name: float(np.mean([p[name] for p in pictures])) for name in ("psnr", "ssim")}
    metrics = settings | {"pictures": pictures, "mean": mean | {"count": len(pictures)}}
    atomic_write(save_dir / "metrics.json", canonical_json(metrics))
    return metrics


def name_of(row: int) -> str:
    return f"{row:08d}"


def read_originals(
    column: Column, tars: Path, count: int
) -> tuple[list[int], list[str], list[Picture]]:
    """Row ids, keys and crops of the first `count` ok rows, read from the source's tars."""
    originals, rows = Originals(column, tars), list[int]()
    for shard in range(len(originals.source.tars)):
        first = shard * originals.source.shard_rows
        ids = np.arange(first, first + column.generation.rows[shard])
        rows += ids[column.status(ids) == Status.OK][: count - len(rows)].tolist()
    if not rows:
        raise TooFewImages(f"{column.path}: holds no valid row")
    how = column.spec.identity["preprocess"]
    keys = [originals.entry(row).key for row in rows]
    return rows, keys, [originals.crop(row, how) for row in rows]


def psnr(a: Picture, b: Picture) -> float:
    """10 log10(255^2 / MSE) over all channels; equal pictures count as differing by one step in one value."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1 / a.size)))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity with the usual Gaussian window, 11 x 11 and sigma 1.5, mean of the channels."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
    )
