"""The demo's judge as scorers: `python -m eval score demo-fd|demo-acc SAVE_DIR ...`

    python -m eval score demo-fd images/vae-plain images/vae-equi --reference held-out/images
    python -m eval score demo-acc images/vae-plain images/vae-equi

The judge is a small classifier of emoji groups, whose weights come with the repository. `demo-fd` is
the Frechet distance of its features to those of real pictures, `demo-acc` the share of pictures that
it puts into their prompt's group. Both mean something for pictures of the demo's kind alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import configs
from shards import sha256_file
from shards.places import model

from ..distances.measure import distance_scorer
from ..distances.metrics import METRICS
from ..errors import BadPrompts
from ..features.features import extract, folder_of, identity, of_set
from ..images.imageset import ImageSetReader
from ..prompts.prompts import Prompt, Prompts
from ..scores.aggregate import aggregate
from ..scores.results import Item, Score
from ..scores.scorer import Scorer

if TYPE_CHECKING:
    from ..features.networks import Network
    from .classifier import Classifier

WEIGHTS = str(Path(configs.__file__).parent / "demo/classifier")
NETWORK, RESIZE = "demo-classifier", "squash64-bicubic"


@cache
def _classifier(path: str, device: str) -> Classifier:
    from .classifier import load_classifier

    return load_classifier(path).to(device)


def _network(path: str | None, device: str) -> Network:
    """Returns the classifier as a network of features (B, 32), of pictures squashed to 64 x 64."""
    from ..features.networks import Network, byte_pixels
    from .classifier import FEATURES, FILE

    folder = path or WEIGHTS
    classifier = _classifier(folder, device)
    return Network(
        NETWORK, sha256_file(Path(folder) / FILE), RESIZE, FEATURES, byte_pixels(RESIZE),
        lambda pixels: classifier.features(pixels.float() / 127.5 - 1), device,
    )  # fmt: skip


def _flags(add: argparse.ArgumentParser) -> None:
    """share of pictures that the demo's classifier puts into their prompt's group"""
    add.add_argument(
        "--model", dest="weights", type=model, default=WEIGHTS, help="folder of the classifier"
    )


def _ready(args: argparse.Namespace) -> None:
    _classifier(args.weights, args.device)


def _suits(args: argparse.Namespace, prompts: Prompts) -> None:
    groups = _classifier(args.weights, args.device).groups
    for prompt in prompts.items:
        group_of(prompt, groups)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    import torch

    classifier = _classifier(args.weights, args.device)
    network = _network(args.weights, args.device)
    groups = classifier.groups
    expected = [group_of(picture.file.prompt, groups) for picture in images]
    blocks = folder_of(images.folder, network, "none")
    features = extract(of_set(images), network, "none", blocks, args.batch_size)
    with torch.inference_mode():
        logits = classifier.head.cpu()(torch.from_numpy(features))
    items = [
        Item(picture.file.prompt.id, picture.number, float(groups[guess] == group), (group,), {"group": groups[guess]})
        for picture, group, guess in zip(images, expected, logits.argmax(1).tolist(), strict=True)
    ]  # fmt: skip
    value, by_group = aggregate(items)
    recipe = json.loads((Path(args.weights) / "recipe.json").read_text())
    yield Score(
        scorer=f"demo-acc-{network.weights[:8]}", benchmark=images.prompts.benchmark, value=value, groups=by_group,
        better="higher", prompts=len({item.prompt for item in items}), pictures=len(items),
        notes=(f"chance {1 / len(groups):.2f}; held-out drawings {recipe['held_out_accuracy']:.2f}",),
        images=images.digest, prompt_list=images.prompts.digest, made_by=identity(network, "none"),
    ), items  # fmt: skip


def group_of(prompt: Prompt, groups: Sequence[str]) -> str:
    """Returns a prompt's group: its own, or the one that its id or text begins with (`flag-1F1EA`)."""
    for text in (prompt.group or "", prompt.id, prompt.text):
        group = text.partition("-")[0]
        if group in groups:
            return group
    raise BadPrompts(
        f"prompt {prompt.id}: found no group of emoji, expected a group, or an id that begins with one: "
        f"{', '.join(groups)}. demo-acc is for the demo's prompts; take another scorer"
    )


# entries among the distances, as of any other network: name -> the entry of which it is the variant
VARIANTS = {
    "demo-fd": "fid", "demo-fdr": "fdr", "demo-mind": "mind", "demo-precision": "precision", "demo-recall": "recall",
}  # fmt: skip
for variant, original in VARIANTS.items():
    METRICS[variant] = replace(
        METRICS[original], prefix=variant, usual=NETWORK, load=_network, model=WEIGHTS,
        help=f"{original} by features of the demo's classifier of emoji",
    )  # fmt: skip
SCORERS = {
    **{variant: distance_scorer(variant) for variant in VARIANTS},
    "demo-acc": Scorer(_flags, _score, _ready, suits=_suits),
}
