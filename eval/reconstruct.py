"""What a column's VAE keeps of a picture: the posterior's mean decoded, beside the original crop.

    <save_dir>/original/images/<row id>.png          as the encoder saw it: resized, cropped
    <save_dir>/reconstruction/images/<row id>.png    from the column's rows, never from the picture
    <save_dir>/reconstruction/scores/                PSNR, SSIM and further scores with intervals
    <save_dir>/metrics.json                          PSNR, SSIM and LPIPS of each picture, their means

All scores are of the 8-bit pictures. Originals do not depend on the column, so reconstructions of
one source by several VAEs are paired. Memory holds one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encode.models import load_vae, to_images
from shards import Column, Status, atomic_write, canonical_json
from shards.console import Bar
from shards.store import Place

from .distances.measure import PACKAGES, enough, measure
from .distances.metrics import METRICS
from .distances.references import make
from .errors import OtherImages, TooFewImages
from .features.features import folder_of, of_set
from .features.lpips import Lpips
from .features.networks import inception
from .images.encoders import relocate_encoder
from .images.imageset import ImageSetReader, ImageSetWriter
from .images.layouts import Picture
from .images.originals import Originals
from .prompts.prompts import Prompt, Prompts
from .report.entries import PREFIX
from .scores import results
from .scores.aggregate import aggregate
from .scores.results import Item, Score

Json = dict[str, Any]
Batch = NDArray[np.uint8]  # (B, H, W, 3)
Scores = Callable[[Batch, Batch], list[float]]  # originals, reconstructions -> a score a pair

LPIPS = {"lpips-alex": "alex", "lpips-vgg": "vgg"}
DISTANCES = {"rfid": "fid", "rkid": "kid"}  # entries of eval.distances.metrics.METRICS
MORE = (*LPIPS, *DISTANCES)


def reconstruct(
    column: Place,
    tars: Path,
    save_dir: Path,
    count: int = 64,
    batch_size: int = 32,
    vae: str | None = None,
    device: str = "cpu",
    scores: Sequence[str] = (),
    inception_folder: Path | None = None,
    lpips_folder: Path | None = None,
    allow_few: bool = False,
    allow_class: Sequence[str] | None = None,
) -> Json:
    """Decodes the first `count` valid rows of a moments or latents column; returns metrics.json.

    `tars` is the folder of its source's tars. `scores` of MORE are computed beside PSNR and SSIM;
    their weights are loaded before anything is decoded. `allow_class`: those of the user that the
    column may name as its encoder.
    """
    opened = Column.open(column)
    kind = opened.layout.kind
    if kind not in ("moments", "latents"):
        raise OtherImages(f"{column}: found a column of {kind}, expected one of moments or latents")
    identity = opened.identity
    results.refuse_versions(save_dir / "reconstruction")
    distances = DISTANCES.keys() & set(scores)
    inception_network = inception(inception_folder, device) if distances else None
    lpips = [Lpips(LPIPS[name], lpips_folder, device) for name in scores if name in LPIPS]
    originals = Originals(opened, tars)
    rows, keys = first_rows(originals, opened, count)
    for name in distances:
        assert inception_network is not None
        enough(METRICS[DISTANCES[name]], inception_network, len(rows), f"{column}", allow_few)
    preprocess = identity.picture
    originals.crop(rows[0], preprocess)  # without its tars nothing is written
    decoder = load_vae(relocate_encoder(identity.encoder, vae), device, allow_class or ())
    folder = opened.store.folder
    source = folder.resolve().parent.name if folder else opened.store.parent.name
    prompts = tuple(Prompt(name_of(row), key) for row, key in zip(rows, keys, strict=True))
    items = Prompts(f"{PREFIX}{source}", prompts)
    settings = {"column": opened.digest, "vae": decoder.weights}
    source_settings = {
        "source": originals.source.fingerprint, "preprocess": preprocess.record(), "kind": "original"
    }  # fmt: skip
    before = ImageSetWriter(save_dir / "original", items, source_settings)
    after = ImageSetWriter(
        save_dir / "reconstruction", items, settings | {"kind": "reconstruction"}
    )
    measures: dict[str, Scores] = {"psnr": _each(psnr), "ssim": _each(ssim)}
    measures |= {network.name: network for network in lpips}
    pictures: list[Json] = []
    with Bar(save_dir.name, len(rows), "pictures") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            values = opened.decoded(opened.read(np.array(batch, np.int64), check=True))
            stored = torch.from_numpy(values).float()
            latents = stored.chunk(2, 1)[0] if kind == "moments" else stored
            decoded = to_images(decoder.decode(latents))
            crops = np.stack([originals.crop(row, preprocess) for row in batch])
            for images, pixels in ((before, crops), (after, decoded)):
                for file, picture in zip(images.files[start:], pixels, strict=False):
                    if not images.has(file):
                        images.save(file, [picture])
            columns = {name: score(crops, decoded) for name, score in measures.items()}
            pictures += [
                {"row": row, "key": keys[start + i], **{name: v[i] for name, v in columns.items()}}
                for i, row in enumerate(batch)
            ]
            bar.advance(len(batch))
    for images in (before, after):
        images.finish({"device": device})
    mean = {name: float(np.mean([p[name] for p in pictures])) for name in measures}
    metrics: Json = {**settings, "pictures": pictures, "mean": mean | {"count": len(pictures)}}
    atomic_write(save_dir / "metrics.json", canonical_json(metrics))
    decoded_set = ImageSetReader.open(save_dir / "reconstruction")
    weights = {network.name: network.weights for network in lpips}
    for name in measures:
        results.write(decoded_set.folder, *_score(name, decoded_set, pictures, weights.get(name)))
    if inception_network is not None:
        real = ImageSetReader.open(save_dir / "original")
        blocks = folder_of(real.folder, inception_network, "none")
        reference = make(of_set(real), inception_network, "none", "originals", blocks, batch_size)
        for name in (name for name in scores if name in DISTANCES):
            score = measure(
                DISTANCES[name], decoded_set, inception_network, reference, few=allow_few,
                batch_size=batch_size, prefix="r", paired=True,
            )  # fmt: skip
            results.write(decoded_set.folder, score)
            metrics["mean"][name] = score.value.value
    return metrics


def _score(
    name: str, images: ImageSetReader, pictures: list[Json], weights: dict[str, str] | None
) -> tuple[Score, list[Item]]:
    """Returns the mean over pictures and its items; `weights` are the score's network's."""
    items = [Item(name_of(p["row"]), 0, p[name]) for p in pictures]
    value, _ = aggregate(items)
    return Score(
        scorer=name, benchmark=images.prompts.benchmark, value=value, prompts=len(items), pictures=len(items),
        better="lower" if name in LPIPS else "higher", images=images.digest, prompt_list=images.prompts.digest,
        made_by={"weights": weights, "versions": {p: version(p) for p in (*PACKAGES, "scikit-image")}},
    ), items  # fmt: skip


def name_of(row: int) -> str:
    return f"{row:08d}"


def first_rows(originals: Originals, column: Column, count: int) -> tuple[list[int], list[str]]:
    """Returns row ids and keys of the first `count` ok rows."""
    rows = list[int]()
    for shard in range(len(originals.source.tars)):
        first = shard * originals.source.shard_rows
        ids = np.arange(first, first + column.snapshot.rows[shard])
        rows += ids[column.status(ids) == Status.OK][: count - len(rows)].tolist()
    if not rows:
        raise TooFewImages(f"{column.path}: holds no valid row")
    return rows, [originals.entry(row).key for row in rows]


def _each(score: Callable[[Picture, Picture], float]) -> Scores:
    return lambda a, b: [score(x, y) for x, y in zip(a, b, strict=True)]


def psnr(a: Picture, b: Picture) -> float:
    """Returns 10 log10(255^2 / MSE) in dB over all channels.

    Equal pictures count as differing by one step in one value.
    """
    error = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1 / a.size)))


def ssim(a: Picture, b: Picture) -> float:
    """Returns structural similarity (Wang et al. 2004): Gaussian window, sigma 1.5."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, data_range=255, channel_axis=2, **options))
