"""The scorers that are distances: `python -m eval score fid|kid|mind|cmmd|clip-fid|fd-dinov2|...`.

    python -m eval score fid images/flux --reference val2014.safetensors --inception /weights
    python -m eval score fdr images/flux --reference half.safetensors --validation other-half.safetensors ...

The name of a score says what it may be compared with:
`fid-clean-coco30k-val2014-cc256-lanczos-1a2b3c4d` is clean-fid's FID of the set's benchmark against
the reference of this label and digest. A new distance is an entry of
`eval.distances.metrics.METRICS`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.places import local_path, model

from ..errors import BadReference, NotFinite, OtherImages, TooFewImages
from ..features import crops
from ..features.features import (
    Floats,
    Pictures,
    clean_listing,
    extract,
    folder_of,
    of_folder,
    of_set,
)
from ..images.imageset import ImageSetReader
from ..scores import results
from ..scores.results import Item, Score, Value
from ..scores.scorer import Scorer, name
from ..scores.seeds import Estimate, over_seeds
from . import influences
from .influences import Influence
from .metrics import INCEPTION, METRICS, Distance, Metric, least
from .references import (
    Reference,
    build,
    check_disjoint,
    check_label,
    check_network,
    default_label,
    make,
    read,
)

if TYPE_CHECKING:
    from ..features.networks import Network

PACKAGES = ("clean-fid", "numpy", "pillow", "torch", "transformers")
UNBIASED = {"kid"}  # metrics that may be compared at different numbers of pictures


def measure(
    kind: str, images: ImageSetReader, network: Network, reference: Reference, *, few: bool = False,
    batch_size: int = 32, prefix: str = "", paired: bool = False,
) -> Score:  # fmt: skip
    """Returns a set's score by an entry of METRICS; keeps features and influences beside the set.

    `paired`: the reference is of the originals of the same pictures, in their order, and varies
    with them. Groups that the reference has too are scored alone, where they have enough pictures.
    """
    metric, pictures = METRICS[kind], of_set(images)
    enough(metric, network, len(pictures), f"{images.folder}", few)
    if reference.validation is not None:
        _enough_others(
            len(reference.validation.features),
            len(pictures),
            reference.validation.label,
            f"{images.folder}",
        )
    crop = reference.record["crop"]
    features = extract(pictures, network, crop, folder_of(images.folder, network, crop), batch_size)
    title = name(prefix + _title(metric, network, images, reference), images)
    distance = metric.distance(features, reference, paired)
    groups, own = _by_group(metric, network, pictures, features, reference, few, paired)
    for part in (distance, *groups.values()):
        if not (np.isfinite(part.value) and np.isfinite(part.influence).all()):
            raise NotFinite(
                f"{images.folder}: found NaN or infinity as {metric.prefix} of its features, expected finite numbers. "
                "Look at the weights: features of 0 or beyond all bounds come from damaged ones"
            )
    shares = [
        Influence(
            picture.file.prompt.id,
            picture.number,
            float(share),
            picture.file.prompt.group,
            in_group,
        )
        for picture, share, in_group in zip(images, distance.influence, own, strict=True)
    ]
    influences.write(images.folder, title, images.digest, shares)

    def value(part: Distance, group: str | None = None) -> Value:
        return over_seeds([influences.estimate(part.value, shares, group, part.subsets)])[0]

    against = distance.against or len(reference.features)
    notes = [f"{len(features)} pictures against {against}", metric.note]
    if groups and metric.gaussian and not metric.relative:
        notes.append("groups are fewer pictures, so theirs are larger; KID has no such bias")
    return Score(
        scorer=title, benchmark=images.prompts.benchmark, better=metric.better, value=value(distance),
        groups={group: value(part, group) for group, part in groups.items()},
        prompts=len({share.prompt for share in shares}), pictures=len(features),
        missing=images.missing_pictures,
        notes=tuple(notes), images=images.digest, prompt_list=images.prompts.digest,
        made_by={
            "metric": kind, "reference": reference.digest, "reference_label": reference.label, **reference.record,
            **distance.made_by,
            "subsets": {group: list(d.subsets) for group, d in {"": distance, **groups}.items() if d.subsets},
            "versions": {package: version(package) for package in PACKAGES},
        },
    )  # fmt: skip


def _by_group(
    metric: Metric, network: Network, pictures: Pictures, features: Floats, reference: Reference,
    few: bool, paired: bool,
) -> tuple[dict[str, Distance], list[float | None]]:  # fmt: skip
    """Returns the distance of each group that is large enough, and influences on it."""
    distances: dict[str, Distance] = {}
    own: list[float | None] = [None] * len(features)
    needed = metric.fewest if few else least(metric, network)
    for group in dict.fromkeys(g for g in pictures.groups if g is not None):
        members = np.array([i for i, name_ in enumerate(pictures.groups) if name_ == group])
        part = reference.of_group(group)
        if part is None or min(len(members), len(part.features)) < needed:
            continue
        if part.validation is not None and len(part.validation.features) < len(members):
            continue
        distances[group] = metric.distance(features[members], part, paired)
        for i, share in zip(members, distances[group].influence, strict=True):
            own[i] = float(share)
    return distances, own


@dataclass(frozen=True)
class Measured:
    """A distance that a set was scored with, and its influences; BadScores where one is missing."""

    folder: Path
    scorer: str

    @cached_property
    def score(self) -> Score:
        return results.read(self.folder / results.NAME / f"{self.scorer}.json")

    @cached_property
    def shares(self) -> list[Influence]:
        return influences.read(self.folder, self.scorer, self.score.images)

    def estimate(self, group: str | None = None) -> Estimate:
        value = self.score.value if group is None else self.score.groups[group]
        subsets = self.score.made_by.get("subsets", {}).get(group or "", ())
        return influences.estimate(value.value, self.shares, group, subsets)


def estimates(folder: Path, scorer: str) -> tuple[Estimate, dict[str, Estimate]]:
    """Returns a set's distance, of all and of each group, with the influence of each prompt."""
    measured = Measured(folder, scorer)
    groups = {group: measured.estimate(group) for group in measured.score.groups}
    return measured.estimate(), groups


def difference_estimates(a: Path, b: Path, scorer: str) -> tuple[Estimate, dict[str, Estimate]]:
    """Returns b minus a of a distance that both sets were scored with, of all and of each group.

    The sets must share their prompts, which are resampled in both at once, so that what a prompt
    does to both cancels. All but KID are larger of fewer pictures, so both sets must hold the same
    ones. OtherImages where prompts, pictures' numbers or references differ, BadScores where a score
    is missing.
    """
    first, second = (Measured(folder, scorer) for folder in (a, b))
    part = ""
    if first.score.made_by.get("reference") != second.score.made_by.get("reference"):
        part = "reference"
    if first.score.prompt_list != second.score.prompt_list:
        part = "prompts"
    if part:
        raise OtherImages(
            f"{a} and {b}: {scorer} is of another {part} in each. Only sets of the same prompts, scored "
            "against the same reference, are compared"
        )
    numbers = [{(share.prompt, share.number) for share in side.shares} for side in (first, second)]
    if first.score.made_by.get("metric") not in UNBIASED and numbers[0] != numbers[1]:
        raise OtherImages(
            f"{a} and {b}: {scorer} is of {len(first.shares)} and of {len(second.shares)} pictures, "
            f"{len(numbers[0] & numbers[1])} of them of the same prompt and number. Fewer pictures alone make a larger "
            "distance, so only sets of the same ones are compared: make both whole, or score kid"
        )
    shared = [group for group in first.score.groups if group in second.score.groups]
    try:
        groups = {group: second.estimate(group) - first.estimate(group) for group in shared}
        return second.estimate() - first.estimate(), groups
    except OtherImages:
        raise OtherImages(
            f"{a} and {b}: {scorer} is of other prompts in each. Score the whole sets"
        ) from None


def difference(a: Path, b: Path, scorer: str) -> tuple[Value, dict[str, Value]]:
    """Returns `difference_estimates` with the intervals over prompts."""
    whole, groups = difference_estimates(a, b, scorer)
    return over_seeds([whole])[0], {g: over_seeds([part])[0] for g, part in groups.items()}


def enough(metric: Metric, network: Network, count: int, where: str, few: bool) -> None:
    """TooFewImages where a set or a reference has too few pictures for this distance."""
    needed = metric.fewest if few else least(metric, network)
    if count < needed:
        advice = ""
        if metric.gaussian and not few:
            advice = (
                ": fewer than features leave no full covariance. Take more, or `score kid`, or --allow-few: the name "
                "then says the number"
            )
        raise TooFewImages(
            f"{where}: found {count} pictures, expected at least {needed} for {metric.prefix}{advice or '. Take more'}"
        )


def _enough_others(others: int, count: int, validation: str, where: str) -> None:
    """TooFewImages where a validation half has fewer pictures than are scored."""
    if others < count:
        raise TooFewImages(
            f"{validation}: found {others} pictures, expected at least the {count} of {where}: the distances of fewer "
            "pictures are larger, so both are of the same number. Take a larger validation half, or score fewer"
        )


def _title(metric: Metric, network: Network, images: ImageSetReader, reference: Reference) -> str:
    parts = [metric.prefix]
    if network.name != metric.usual:
        parts.append(network.name.partition("-")[2])
    parts += [re.sub(r"[^\w.-]+", "-", images.prompts.benchmark), reference.name]
    count = sum(len(file.numbers) for file in images.files)
    if min(count, len(reference.features)) < least(metric, network):
        parts.append(f"few-{count}")
    elif metric.counted:
        parts.append(str(count))
    return "-".join(parts)


# The scorers --------------------------------------------------------------------------------------


def _flags(metric: Metric, add: argparse.ArgumentParser) -> None:
    add.add_argument("--reference", type=local_path, required=True,
                     help="what `score reference` wrote, or a folder of real pictures")  # fmt: skip
    if metric.relative:
        other = "other real pictures than the reference's: a file or a folder, as --reference"
        add.add_argument("--validation", type=local_path, required=True, help=other)
    add.add_argument("--crop", type=crops.argument, default="none",
                     help="of both sides, where --reference is a folder: cc256-lanczos, squash256-bicubic")  # fmt: skip
    add.add_argument(
        "--label", help="the folder's part of the score's name (default: folder and crop)"
    )
    add.add_argument("--allow-few", action="store_true",
                     help="score fewer pictures than the network is wide; the name says so")  # fmt: skip
    if metric.model is None:
        add.add_argument(
            "--inception", dest="weights", type=model, help=f"folder that holds {INCEPTION}.pt"
        )
    else:
        add.add_argument(
            "--model", dest="weights", type=model, default=metric.model, help="name or folder"
        )


# networks and references are loaded once a command, which may score several sets


@cache
def _network(kind: str, weights: str | None, device: str) -> Network:
    return METRICS[kind].load(weights, device)


_stored = cache(read)


@cache
def _real(
    path: Path, kind: str, weights: str | None, device: str, crop: str, label: str | None,
    batch_size: int,
) -> Reference:  # fmt: skip
    """Returns a file's reference, or that of a folder, whose pictures then run through the network."""
    if not path.is_dir():
        return _stored(path)
    network, label = _network(kind, weights, device), label or default_label(path, crop)
    return make(of_folder(path), network, crop, label, None, batch_size)


@cache
def _beside(reference: Reference, validation: Reference) -> Reference:
    return reference.beside(validation)


def _reference(kind: str, args: argparse.Namespace) -> Reference:
    network = kind, args.weights, args.device
    reference = _real(args.reference, *network, args.crop, args.label, args.batch_size)
    if not METRICS[kind].relative:
        return reference
    crop = reference.record["crop"]
    return _beside(reference, _real(args.validation, *network, crop, None, args.batch_size))


def _ready(kind: str, args: argparse.Namespace) -> None:
    """Loads the weights and checks the reference, and the validation half where there is one."""
    network, path, metric = _network(kind, args.weights, args.device), args.reference, METRICS[kind]
    if path.is_dir():
        crop = args.crop
        check_label(args.label or default_label(path, crop))
    else:
        reference = _stored(path)
        check_network(reference, network, path)
        crop = reference.record["crop"]
        if args.crop not in ("none", crop):
            raise BadReference(
                f"{path}: made with the crop {crop}, found --crop {args.crop}. Leave it out: both sides get the "
                "reference's"
            )
        if args.label:
            raise BadReference(
                f"{path}: labelled {reference.label} when it was made. Leave --label out"
            )
    enough(metric, network, _count(path), f"{path}", args.allow_few)
    if metric.relative:
        _ready_validation(args.validation, path, crop, network)
        enough(metric, network, _count(args.validation), f"{args.validation}", args.allow_few)


def _ready_validation(path: Path, reference: Path, crop: str, network: Network) -> None:
    """BadReference where a validation half is of another network or crop, or shares pictures."""
    if path.is_dir():
        check_label(default_label(path, crop))
    else:
        validation = _stored(path)
        check_network(validation, network, path)
        if validation.record["crop"] != crop:
            raise BadReference(
                f"{path}: made with the crop {validation.record['crop']}, expected {crop} as of {reference}: both are "
                "real pictures prepared alike. Make it again with this crop"
            )
    check_disjoint(_digests(reference), _digests(path), f"{path}")


def _count(path: Path) -> int:
    return len(clean_listing(path) if path.is_dir() else _stored(path).features)


@cache
def _digests(path: Path) -> tuple[str, ...]:
    return tuple(of_folder(path).digests) if path.is_dir() else _stored(path).pictures


def _enough(kind: str, args: argparse.Namespace, count: int, where: str) -> None:
    metric = METRICS[kind]
    enough(metric, _network(kind, args.weights, args.device), count, where, args.allow_few)
    if metric.relative:
        _enough_others(_count(args.validation), count, f"{args.validation}", where)


def _score(
    kind: str, images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    network, reference = _network(kind, args.weights, args.device), _reference(kind, args)
    few, size = args.allow_few, args.batch_size
    yield measure(kind, images, network, reference, few=few, batch_size=size), ()


def distance_scorer(kind: str) -> Scorer:
    """Returns the scorer of an entry of METRICS."""
    metric = METRICS[kind]

    def flags(add: argparse.ArgumentParser) -> None:
        _flags(metric, add)

    flags.__doc__ = metric.help
    return Scorer(flags, partial(_score, kind), partial(_ready, kind), partial(_enough, kind))


DISTANCES = {kind: distance_scorer(kind) for kind in METRICS}


def reference_flags(add: argparse.ArgumentParser) -> None:
    """features of a folder of real pictures, kept for scoring against"""
    add.add_argument("folder", type=local_path, help="of real pictures")
    add.add_argument("--out", type=local_path, required=True, help="a .safetensors file")
    add.add_argument("--of", choices=METRICS, default="fid", help="FID's serve KID too")
    add.add_argument("--crop", type=crops.argument, default="none",
                     help="of both sides: none, or such as cc256-lanczos, squash256-bicubic")  # fmt: skip
    add.add_argument("--label", help="its part of a score's name (default: folder and crop)")
    add.add_argument("--inception", type=model, help=f"folder that holds {INCEPTION}.pt")
    add.add_argument(
        "--model",
        type=model,
        help="name or folder of the other distances' network (default: theirs)",
    )


def make_reference(args: argparse.Namespace) -> None:
    """`python -m eval score reference FOLDER --out FILE`."""
    metric = METRICS[args.of]
    weights = args.inception if metric.model is None else args.model or metric.model
    network = metric.load(weights, args.device)
    reference = build(args.folder, args.out, network, args.crop, args.label, args.batch_size)
    print(f"{args.out}: {reference.name}, {len(reference.features)} pictures")
