"""CLIP score: how well a picture fits its prompt, 100 * max(cosine of embeddings, 0), no prefix.

    python -m eval score clipscore images/flux --model openai/clip-vit-base-patch32

The name has the architecture and the weights' digest: `clipscore-vit-b-32-1a2b3c4d`. Captions
longer than the model's 77 tokens are cut, and counted. Embeddings of pictures are kept, shared with
CLIP-FID.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from shards.places import model

from ..distances.measure import PACKAGES
from ..distances.metrics import CLIP_BASE
from ..features.features import extract, folder_of, identity, of_set
from ..images.imageset import ImageSetReader
from ..prompts.prompts import Prompt
from ..scores.aggregate import aggregate
from ..scores.results import Item, Score
from ..scores.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from ..features.networks import Clip


def _flags(add: argparse.ArgumentParser) -> None:
    """cosine of picture and prompt by a CLIP model, x 100"""
    add.add_argument("--model", type=model, default=CLIP_BASE, help="name or folder")


@cache
def _clip(path: str, device: str) -> Clip:
    from ..features.networks import Clip

    clip = Clip(path, device)
    clip.load_tokenizer()
    return clip


def _ready(args: argparse.Namespace) -> None:
    _clip(args.model, args.device)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    import torch

    clip = _clip(args.model, args.device)
    network = clip.network("short-bicubic")
    prompts = list({file.prompt.id: file.prompt for file in images.files}.values())
    captions, cut = _captions(clip, prompts, args.batch_size)
    cache_folder = folder_of(images.folder, network, "none")
    features = extract(of_set(images), network, "none", cache_folder, args.batch_size)
    embeddings = torch.nn.functional.normalize(torch.from_numpy(features).double())
    items = []
    for picture, embedding in zip(images, embeddings, strict=True):
        prompt = picture.file.prompt
        cosine = float(embedding @ captions[prompt.id])
        groups = () if prompt.group is None else (prompt.group,)
        details = {"cosine": cosine, "cut": prompt.id in cut}
        items.append(Item(prompt.id, picture.number, 100 * max(cosine, 0), groups, details))
    overall, by_group = aggregate(items)
    notes = (f"{len(cut)} of {len(prompts)} captions were cut",) if cut else ()
    yield Score(
        scorer=f"clipscore-{clip.arch}-{clip.weights[:8]}", benchmark=images.prompts.benchmark, value=overall,
        better="higher", groups=by_group, prompts=len(prompts), pictures=len(items),
        missing=images.missing_pictures,
        notes=notes, images=images.digest, prompt_list=images.prompts.digest,
        made_by=identity(network, "none") | {
            "model": args.model, "captions_cut": len(cut), "versions": {p: version(p) for p in PACKAGES},
        },
    ), items  # fmt: skip


def _captions(
    clip: Clip, prompts: list[Prompt], batch_size: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Returns the unit embedding of each prompt by its id, and the ids of those that were cut."""
    embeddings: dict[str, Tensor] = {}
    cut: set[str] = set()
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rows, shortened = clip.captions([prompt.text for prompt in part])
        units = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        embeddings |= {prompt.id: unit for prompt, unit in zip(part, units, strict=True)}
        cut |= {prompt.id for prompt, short in zip(part, shortened, strict=True) if short}
    return embeddings, cut


SCORER = Scorer(_flags, _score, _ready)
