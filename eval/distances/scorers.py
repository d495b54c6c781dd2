"""`python -m eval score fid|kid|cmmd|clip-fid|fd-dinov2 SAVE_DIR ... --reference REFERENCE`, and `score reference`.

python -m eval score reference val2014 --out val2014.safetensors --crop cc256-lanczos --inception /weights
python -m eval score fid images/flux images/sd35 --reference val2014.safetensors --inception /weights
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from shards.places import local_path, model

from ..errors import BadReference
from ..features import crops
from ..features.features import clean_listing, of_folder
from ..features.networks import Network
from ..images.imageset import ImageSetReader
from ..scores.results import Item, Score
from ..scores.scorer import Scorer
from .measure import enough, measure
from .metrics import INCEPTION, METRICS, Metric
from .references import Reference, build, check_label, check_network, default_label, make, read


def _flags(metric: Metric, add: argparse.ArgumentParser) -> None:
    add.add_argument("--reference", type=local_path, required=True,
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
        add.add_argument(
            "--inception", dest="weights", type=model, help=f"folder that holds {INCEPTION}.pt"
        )
    else:
        add.add_argument(
            "--model", dest="weights", type=model, default=metric.model, help="name or folder"
        )


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
        if args.label:
            raise BadReference(
                f"{args.reference}: labelled {reference.label} when it was made. Leave --label out"
            )
        count = len(reference.features)
    enough(METRICS[kind], network, count, f"{args.reference}", args.allow_few)


def _enough(kind: str, args: argparse.Namespace, count: int, where: str) -> None:
    network = _network(kind, args.weights, args.device)
    enough(METRICS[kind], network, count, where, args.allow_few)


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
    kind: str, images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    network = _network(kind, args.weights, args.device)
    reference = _reference(
        args.reference, kind, args.weights, args.device, args.crop, args.label, args.batch_size
    )
    few, size = args.allow_few, args.batch_size
    yield measure(kind, images, network, reference, few=few, batch_size=size), ()


def reference_flags(add: argparse.ArgumentParser) -> None:
    """features of a folder of real pictures, kept for scoring against"""
    add.add_argument("folder", type=local_path)
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
    metric = METRICS[args.of]
    where = args.inception if metric.model is None else args.model or metric.model
    network = metric.load(where, args.device)
    made = build(args.folder, args.out, network, args.crop, args.label, args.batch_size)
    print(f"{args.out}: {made.name}, {len(made.features)} pictures")


def _scorer(kind: str, metric: Metric) -> Scorer:
    def flags(add: argparse.ArgumentParser) -> None:
        _flags(metric, add)

    flags.__doc__ = metric.help
    return Scorer(flags, partial(_score, kind), partial(_ready, kind), partial(_enough, kind))


DISTANCES = {kind: _scorer(kind, metric) for kind, metric in METRICS.items()}
