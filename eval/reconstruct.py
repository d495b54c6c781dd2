"""What a column's VAE keeps of a picture: the posterior's mean decoded, beside the original crop.

    <save_dir>/original/images/<row id>.png          as the encoder saw it: resized, cropped
    <save_dir>/reconstruction/images/<row id>.png    from the column's rows, never from the picture
    <save_dir>/reconstruction/scores/                PSNR, also by octave, SSIM and further scores with intervals
    <save_dir>/interpolation/images/<row id>.png     half-way to a neighbour, where such a score is asked for
    <save_dir>/metrics.json                          scores of each picture, and their means

All scores are of the 8-bit pictures. Originals do not depend on the column, so reconstructions of
one source by several VAEs are paired. Memory holds one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from encode.models import Vae, load_vae, to_images
from shards import Column, atomic_write, canonical_json
from shards.console import Bar
from shards.read import undraw
from shards.store import Place

from .demo import judge  # noqa: F401  # its distance becomes an entry of METRICS
from .distances import influences
from .distances.measure import PACKAGES, enough, measure
from .distances.metrics import METRICS
from .distances.references import make
from .errors import BadRequest, OtherImages, TooFewImages
from .features.features import folder_of, of_set
from .features.lpips import Lpips
from .images.encoders import relocate_encoder
from .images.imageset import ImageSetReader, ImageSetWriter
from .images.layouts import Picture
from .images.originals import Originals
from .latents import interpolation
from .latents.detail import octave_names, psnr_by_octave
from .latents.interpolation import Interpolation
from .prompts.prompts import Prompt, Prompts
from .report.entries import PREFIX
from .scores import results
from .scores.aggregate import aggregate
from .scores.results import Item, Score

if TYPE_CHECKING:
    from .features.networks import Network

Json = dict[str, Any]
Ints = NDArray[np.int64]
Batch = NDArray[np.uint8]  # (B, H, W, 3)
Scores = Callable[[Batch, Batch], list[float]]  # originals, reconstructions -> a score a pair

LPIPS = {"lpips-alex": "alex", "lpips-vgg": "vgg"}
KINDS = ("fid", "kid", "mind", "demo-fd")  # entries of eval.distances.metrics.METRICS
DISTANCES = {f"r{kind}": kind for kind in KINDS}  # of reconstructions from their originals
INTERPOLATED = {f"i{kind}": kind for kind in KINDS}  # of what lies half-way to a neighbour
MORE = (*LPIPS, *DISTANCES, *INTERPOLATED)


@dataclass(frozen=True)
class Decoded:
    """A set of decoded pictures of rows, and what decodes them."""

    column: Column
    rows: Ints
    decoder: Vae
    images: ImageSetWriter
    batch_size: int

    def batches(self, latents: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Batch]]:
        """Yields decoded pictures (B, H, W, 3), each saved where it was not; `latents` returns those of a
        part of the rows, as the decoder takes them.
        """
        with Bar(self.images.folder.name, len(self.rows), "pictures") as bar:
            for start in range(0, len(self.rows), self.batch_size):
                part = slice(start, min(start + self.batch_size, len(self.rows)))
                pictures = to_images(self.decoder.decode(latents(part)))
                save(self.images, part, pictures)
                yield part, pictures
                bar.advance(len(pictures))


def save(images: ImageSetWriter, part: slice, pictures: Batch) -> None:
    """Saves the pictures of a part of a set, those that are missing."""
    for file, picture in zip(images.files[part], pictures, strict=True):
        if not images.has(file):
            images.save(file, [picture])


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
    neighbours_of: Place | None = None,
    reference_rows: int = 50_000,
    neighbours: int = 1,
    draw: bool = False,
    also: Sequence[Place] = (),
) -> Json:
    """Decodes the first `count` valid rows of a moments or latents column; returns metrics.json.

    `tars` is the folder of its source's tars. `scores` of MORE are computed beside PSNR and SSIM;
    their weights are loaded before anything is decoded. `allow_class`: those of the user that the
    column may name as its encoder. `neighbours_of`: a column of the same encoder whose rows are the
    neighbours of INTERPOLATED, None for the other rows of this one; see `latents.interpolation`. `also`:
    columns in which all rows that are used must be valid too, so that each of several columns has the same.
    """
    if (neighbours > 1) != draw:
        raise BadRequest(
            f"found neighbours {neighbours} {'with' if draw else 'without'} draw, expected one of several to be drawn: "
            "`--neighbours 10 --draw`, or neither for the nearest"
        )
    opened = Column.open(column)
    refuse_other_kinds(opened)
    identity = opened.identity
    results.refuse_versions(save_dir / "reconstruction")
    kinds = {name: kind for name, kind in (DISTANCES | INTERPOLATED).items() if name in scores}
    networks = _networks(kinds.values(), inception_folder, device)
    lpips = [Lpips(LPIPS[name], lpips_folder, device) for name in scores if name in LPIPS]
    originals = Originals(opened, tars)
    reference = opened if neighbours_of is None else Column.open(neighbours_of)
    others = [Column.open(place) for place in also]
    refuse_other_sources(others, [opened, reference])
    rows = interpolation.shared_rows(opened, others)[:count]
    if not len(rows):
        raise TooFewImages(
            f"{column}: holds no row that is valid{' in all of --also' if also else ''}"
        )
    ids: list[int] = rows.tolist()
    keys = [originals.entry(row).key for row in ids]
    for kind, network in networks.items():
        enough(METRICS[kind], network, len(rows), f"{column}", allow_few)
    half_way = None
    if INTERPOLATED.keys() & kinds.keys():
        refuse_other_kinds(reference)
        half_way = Interpolation.of(
            reference, opened, rows, reference_rows, neighbours, draw, others
        )
    preprocess = identity.picture
    originals.crop(ids[0], preprocess)  # without its tars nothing is written
    decoder = load_vae(relocate_encoder(identity.encoder, vae), device, allow_class or ())
    folder = opened.store.folder
    source = folder.resolve().parent.name if folder else opened.store.parent.name
    prompts = tuple(Prompt(name_of(row), key) for row, key in zip(ids, keys, strict=True))
    items = Prompts(f"{PREFIX}{source}", prompts)
    settings = {"column": opened.digest, "vae": decoder.weights}
    source_settings = {
        "source": originals.source.fingerprint, "preprocess": preprocess.record(), "kind": "original"
    }  # fmt: skip
    before = ImageSetWriter(save_dir / "original", items, source_settings)
    after = ImageSetWriter(
        save_dir / "reconstruction", items, settings | {"kind": "reconstruction"}
    )
    between = None
    if half_way is not None:
        own = settings | {"kind": "interpolation", "reference": half_way.record}
        between = ImageSetWriter(save_dir / half_way.folder, items, own)
    measures: dict[str, Scores] = {"psnr": _each(psnr), "ssim": _each(ssim)}
    measures |= {network.name: network for network in lpips}
    pictures: list[Json] = []
    decoding = Decoded(opened, rows, decoder, after, batch_size)
    for part, decoded in decoding.batches(lambda part: interpolation.means(opened, rows[part])):
        crops = np.stack([originals.crop(row, preprocess) for row in ids[part]])
        save(before, part, crops)
        columns = {name: score(crops, decoded) for name, score in measures.items()}
        octaves = [psnr_by_octave(x, y) for x, y in zip(crops, decoded, strict=True)]
        names = octave_names(*crops.shape[1:3])
        pictures += [
            {
                "row": ids[part][i],
                "key": keys[part][i],
                **{name: v[i] for name, v in columns.items()},
            }
            | dict(zip(names, octaves[i], strict=True))
            for i in range(len(decoded))
        ]
    for images in (before, after):
        images.finish({"device": device})
    if half_way is not None and between is not None:
        _interpolate(half_way, Decoded(opened, rows, decoder, between, batch_size), device)
    per_picture = [name for name in pictures[0] if name not in ("row", "key")]
    mean = {name: float(np.mean([p[name] for p in pictures])) for name in per_picture}
    metrics: Json = {**settings, "pictures": pictures, "mean": mean | {"count": len(pictures)}}
    atomic_write(save_dir / "metrics.json", canonical_json(metrics))
    decoded_set = ImageSetReader.open(save_dir / "reconstruction")
    weights = {network.name: network.weights for network in lpips}
    for name in per_picture:
        results.write(decoded_set.folder, *_score(name, decoded_set, pictures, weights.get(name)))
    for name, kind in kinds.items():
        network = networks[kind]
        real = ImageSetReader.open(save_dir / "original")
        blocks = folder_of(real.folder, network, "none")
        originals_of = make(of_set(real), network, "none", "originals", blocks, batch_size)
        how = half_way if name in INTERPOLATED else None
        folder = save_dir / (how.folder if how else "reconstruction")
        score = measure(
            kind, ImageSetReader.open(folder), network, originals_of, few=allow_few, batch_size=batch_size,
            prefix=name[0], paired=True,
        )  # fmt: skip
        if how is not None:
            score = _beside(decoded_set, folder, score, how)
        results.write(decoded_set.folder, score)
        metrics["mean"][name] = score.value.value
    return metrics


def _interpolate(how: Interpolation, decoded: Decoded, device: str) -> None:
    """Decodes what lies half-way between rows and their neighbours, where a picture of it is missing."""
    if any(not decoded.images.has(file) for file in decoded.images.files):
        work = len(how.rows) * interpolation.passes(decoded.column, len(decoded.rows))
        with Bar("neighbours", work, "rows") as bar:
            chosen = interpolation.chosen(how, decoded.column, decoded.rows, device, bar.advance)

        def latents(part: slice) -> Tensor:
            a = interpolation.normalised(decoded.column, decoded.rows[part])
            b = interpolation.normalised(how.reference, chosen[part])
            norm = decoded.column.spec.norm
            assert norm is not None
            return undraw(interpolation.half_way(a, b), norm)

        for _ in decoded.batches(latents):
            pass
    decoded.images.finish({"device": device})


def _beside(decoded: ImageSetReader, folder: Path, score: Score, how: Interpolation) -> Score:
    """Returns a score of interpolated pictures as one of the reconstructions', beside which its
    influences are kept; its name says among which rows the neighbours are.
    """
    scorer = f"{score.scorer}-{how.digest}"
    shares = influences.read(folder, score.scorer, score.images)
    influences.write(decoded.folder, scorer, decoded.digest, shares)
    taken = f"one of {how.neighbours} drawn" if how.draw else "the nearest"
    note = f"half-way to {taken} of {len(how.rows):,} rows of {how.reference.path}"
    return replace(
        score, scorer=scorer, images=decoded.digest, notes=(*score.notes, note),
        made_by={**score.made_by, "neighbours": how.record},
    )  # fmt: skip


def refuse_other_kinds(column: Column) -> None:
    """Raises OtherImages for a column that is not of latents."""
    if (kind := column.layout.kind) not in ("moments", "latents"):
        raise OtherImages(
            f"{column.path}: found a column of {kind}, expected one of moments or latents"
        )


def refuse_other_sources(others: Sequence[Column], columns: Sequence[Column]) -> None:
    """Raises OtherImages for a column that is of the source of none of `columns`."""
    sources = {column.identity.source for column in columns}
    for other in others:
        if other.identity.source not in sources:
            raise OtherImages(
                f"{other.path}: found a column of another source, expected one of the rows that are decoded, or of "
                "those of --neighbours_of"
            )


def _networks(
    kinds: Iterable[str], inception_folder: Path | None, device: str
) -> dict[str, Network]:
    """Returns the network of each kind of distance, loaded once where two have the same."""
    networks: dict[str, Network] = {}
    for kind in dict.fromkeys(kinds):
        metric = METRICS[kind]
        same = next((n for k, n in networks.items() if METRICS[k].load is metric.load), None)
        place = str(inception_folder) if inception_folder and metric.model is None else metric.model
        networks[kind] = same or metric.load(place, device)
    return networks


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
