"""Distances between a set of pictures and real ones: FID, KID, CMMD, FD-DINOv2, CLIP-FID.

    python -m eval score fid images/flux --reference val2014.safetensors --inception /weights

The name of a score says what it may be compared with: `fid-clean-coco30k-val2014-cc256-lanczos-1a2b3c4d` is clean-fid's
FID of the set's benchmark against the reference of this label and digest.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import crops, influences, results
from .errors import BadReference, OtherImages, TooFewImages
from .features import clean_listing, extract, folder_of, of_folder, of_set
from .imageset import Images
from .influences import Influence
from .metrics import INCEPTION, METRICS, Found, Metric, least
from .networks import Network
from .references import Reference, build, check_label, check_network, default_label, make, read
from .results import Item, Score, Value
from .score import Scorer, name

PACKAGES = ("clean-fid", "numpy", "pillow", "torch", "transformers")


def _flags(metric: Metric, add: argparse.ArgumentParser) -> None:
    add.add_argument("--reference", type=Path, required=True,
                     help="what `score reference` wrote, or a folder of real pictures")  # fmt: skip
    add.add_argument("--crop", type=crops.argument, default="none",
                     help="of both sides, where --reference is a folder: cc256-lanczos, squash256-bicubic")  # fmt: skip
    add.add_argument(
        "--label", help="the folder's part of the score's name (default: folder and crop)"
    )
    add.add_argument("--allow-few", action="store_true",
                     help="score fewer pictures than the network is wide; the name says so")  # fmt: skip
    _weights_flag(metric, add)


def _weights_flag(metric: Metric, add: argparse.ArgumentParser) -> None:
    if metric.model is None:
        add.add_argument("--inception", dest="weights", help=f"folder that holds {INCEPTION}.pt")
    else:
        add.add_argument("--model", dest="weights", default=metric.model, help="name or folder")


@cache
def _network(kind: str, where: str | None, device: str) -> Network:
    return METRICS[kind].load(where, device)


def _ready(kind: str, args: argparse.Namespace) -> None:
    """Load the weights and look at the reference."""
    network = _network(kind, args.weights, args.device)
    if args.reference.is_dir():
        check_label(args.label or default_label(args.reference, args.crop))
        count = len(clean_listing(args.reference))
    else:
        reference = _stored(args.reference)
        check_network(reference, network, args.reference)
        if args.crop not in ("none", reference.record["crop"]):
            raise BadReference(
                f"{args.reference}: made with the crop {reference.record['crop']}, found --crop {args.crop}. Leave it "
                "out: both sides get the reference's"
            )
        count = len(reference.features)
    _enough(METRICS[kind], network, count, f"{args.reference}", args.allow_few)


@cache
def _stored(path: Path) -> Reference:
    return read(path)


@cache
def _reference(
    path: Path,
    kind: str,
    where: str | None,
    device: str,
    crop: str,
    label: str | None,
    batch_size: int,
) -> Reference:
    """Of a file, or of a folder whose pictures are run through the network once a command."""
    if not path.is_dir():
        return _stored(path)
    network = _network(kind, where, device)
    return make(
        of_folder(path), network, crop, label or default_label(path, crop), None, batch_size
    )


def _score(
    kind: str, images: Images, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    metric, network = METRICS[kind], _network(kind, args.weights, args.device)
    pictures = of_set(images)
    _enough(metric, network, len(pictures), f"{images.folder}", args.allow_few)
    reference = _reference(
        args.reference, kind, args.weights, args.device, args.crop, args.label, args.batch_size
    )
    cut = reference.record["crop"]
    kept = folder_of(images.folder, network, cut)
    features = extract(pictures, network, cut, kept, args.batch_size)
    few = min(len(features), len(reference.features)) < least(metric, network)
    title = name(_title(metric, network, images, reference, few), images)
    found, groups = metric.distance(features, reference), dict[str, Found]()
    own: list[float | None] = [None] * len(features)
    for group in dict.fromkeys(pictures.groups):
        at = np.array([i for i, other in enumerate(pictures.groups) if other == group])
        part = reference.of_group(group) if group else None
        if (
            group
            and part
            and _suffices(metric, network, len(at), len(part.features), args.allow_few)
        ):
            groups[group] = metric.distance(features[at], part)
            for i, each in zip(at, groups[group].influence, strict=True):
                own[i] = float(each)
    each_picture = [
        Influence(one.file.prompt.id, one.number, float(all_), one.file.prompt.group, alone)
        for one, all_, alone in zip(images, found.influence, own, strict=True)
    ]
    influences.write(images.folder, title, images.digest, each_picture)
    strata = influences.strata_of(each_picture)
    values = {
        group: influences.value(
            one.value, influences.totals(each_picture, group), strata, _drawn(one.subsets)
        )
        for group, one in groups.items()
    }
    notes = [f"{len(features)} pictures against {len(reference.features)}", metric.note]
    if groups and metric.gaussian:
        notes.append("groups are fewer pictures, so theirs are larger; KID has no such bias")
    yield Score(
        scorer=title, benchmark=images.prompts.benchmark, better="lower", groups=values,
        value=influences.value(
            found.value, influences.totals(each_picture), strata, _drawn(found.subsets)
        ),
        prompts=len({i.prompt for i in each_picture}), pictures=len(features), missing=images.missing,
        notes=tuple(notes), images=images.digest, prompt_list=images.prompts.digest,
        made_by={
            "metric": kind, "reference": reference.digest, "reference_label": reference.label, **reference.record,
            "subsets": {group or "": list(one.subsets) for group, one in {"": found, **groups}.items()},
            "versions": {package: version(package) for package in PACKAGES},
        },
    ), ()  # fmt: skip


def difference(a: Path, b: Path, scorer: str) -> tuple[Value, dict[str, Value]]:
    """b minus a of a distance that both sets were scored with, of all and of each group.

    The sets must share their prompts, and then their seeds: each prompt is taken away from both at once, so what it
    does to both cancels. OtherImages where prompts or references differ, BadScores where one was not scored.
    """
    first, second = (results.read(folder / results.NAME / f"{scorer}.json") for folder in (a, b))
    for what, found in (
        ("prompts", (first.prompt_list, second.prompt_list)),
        ("reference", (first.made_by.get("reference"), second.made_by.get("reference"))),
    ):
        if found[0] != found[1]:
            raise OtherImages(
                f"{a} and {b}: {scorer} is of another {what} in each. Only sets of the same prompts, scored "
                "against the same reference, are compared"
            )
    ours, theirs = (
        influences.read(folder, scorer, score.images) for folder, score in ((a, first), (b, second))
    )
    strata = influences.strata_of(ours)

    def apart(group: str | None) -> Value:
        one, other = (influences.totals(each, group) for each in (ours, theirs))
        if one.keys() != other.keys():
            raise OtherImages(
                f"{a} and {b}: {scorer} is of other prompts in each. Score the whole sets"
            )
        parts = {prompt: other[prompt] - one[prompt] for prompt in one}
        drawn = [np.array(s.made_by["subsets"].get(group or "", [])) for s in (first, second)]
        values = [s.value if group is None else s.groups[group] for s in (first, second)]
        return influences.value(
            values[1].value - values[0].value, parts, strata, _drawn(drawn[1] - drawn[0])
        )

    shared = [group for group in first.groups if group in second.groups]
    return apart(None), {group: apart(group) for group in shared}


def _suffices(metric: Metric, network: Network, count: int, real: int, few: bool) -> bool:
    return min(count, real) >= (2 if few else least(metric, network))


def _enough(metric: Metric, network: Network, count: int, where: str, few: bool) -> None:
    needed = 2 if few else least(metric, network)
    if count < needed:
        raise TooFewImages(
            f"{where}: found {count} pictures, expected at least {needed} for {metric.prefix}: fewer than features "
            "leave no full covariance. Take more, or `score kid`, or --allow-few: the name then says the number"
        )


def _title(
    metric: Metric, network: Network, images: Images, reference: Reference, few: bool
) -> str:
    parts = [metric.prefix]
    if network.name != metric.usual:
        parts.append(network.name.partition("-")[2])
    parts += [re.sub(r"[^\w.-]+", "-", images.prompts.benchmark), reference.name]
    if few:
        parts.append(f"few-{sum(len(file.numbers) for file in images.files)}")
    return "-".join(parts)


def _drawn(subsets: Sequence[float] | NDArray[np.float64]) -> float:
    """What is added to a variance because subsets were drawn, not all of them taken."""
    return float(np.var(subsets, ddof=1) / len(subsets)) if len(subsets) else 0.0


def reference_flags(add: argparse.ArgumentParser) -> None:
    """features of a folder of real pictures, kept for scoring against"""
    add.add_argument("folder", type=Path)
    add.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    add.add_argument("--of", choices=METRICS, default="fid", help="FID's serve KID too")
    add.add_argument("--crop", type=crops.argument, default="none",
                     help="of both sides: none, or such as cc256-lanczos, squash256-bicubic")  # fmt: skip
    add.add_argument("--label", help="its part of a score's name (default: folder and crop)")
    add.add_argument("--inception", help=f"folder that holds {INCEPTION}.pt")
    add.add_argument(
        "--model", help="name or folder of the other distances' network (default: theirs)"
    )


def make_reference(args: argparse.Namespace) -> None:
    metric = METRICS[args.of]
    where = args.inception if metric.model is None else args.model or metric.model
    network = metric.load(where, args.device)
    made = build(args.folder, args.out, network, args.crop, args.label, args.batch_size)
    print(f"{args.out}: {made.name}, {len(made.features)} pictures")


def _scorer(kind: str, metric: Metric) -> Scorer:
    def flags(add: argparse.ArgumentParser) -> None:
        _flags(metric, add)

    flags.__doc__ = metric.help
    return Scorer(flags, partial(_score, kind), partial(_ready, kind))


DISTANCES = {kind: _scorer(kind, metric) for kind, metric in METRICS.items()}
