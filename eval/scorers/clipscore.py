"""CLIP score: how well each picture fits its prompt, 100 * max(cosine of the embeddings, 0), no prefix.

    python -m eval score clipscore images/flux --model openai/clip-vit-base-patch32

The name has the architecture and the weights' digest: `clipscore-vit-b-32-1a2b3c4d`. Captions longer than the model's
77 tokens are cut, and counted. Embeddings of the pictures are kept, and shared with CLIP-FID.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from shards.places import model

from ..distances.measure import PACKAGES
from ..distances.metrics import CLIP_BASE
from ..features.features import extract, folder_of, identity, of_set
from ..features.networks import Clip
from ..images.imageset import ImageSetReader
from ..prompts.prompts import Prompt
from ..scores.aggregate import aggregate
from ..scores.results import Item, Score
from ..scores.scorer import Scorer


def flags(add: argparse.ArgumentParser) -> None:
    """cosine of picture and prompt by a CLIP model, x 100"""
    add.add_argument("--model", type=model, default=CLIP_BASE, help="name or folder")


@cache
def _clip(path: str, device: str) -> Clip:
    clip = Clip(path, device)
    clip.load_tokenizer()
    return clip


def _ready(args: argparse.Namespace) -> None:
    _clip(args.model, args.device)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    clip = _clip(args.model, args.device)
    network = clip.network("short-bicubic")
    prompts = list({file.prompt.id: file.prompt for file in images.files}.values())
    captions, cut = _captions(clip, prompts, args.batch_size)
    kept = folder_of(images.folder, network, "none")
    pictures = extract(of_set(images), network, "none", kept, args.batch_size)
    seen = torch.nn.functional.normalize(torch.from_numpy(pictures).double())
    items = []
    for one, picture in zip(images, seen, strict=True):
        prompt = one.file.prompt
        cosine = float(picture @ captions[prompt.id])
        groups = () if prompt.group is None else (prompt.group,)
        found = {"cosine": cosine, "cut": prompt.id in cut}
        items.append(Item(prompt.id, one.number, 100 * max(cosine, 0), groups, found))
    overall, groups_ = aggregate(items)
    notes = (f"{len(cut)} of {len(prompts)} captions were cut",) if cut else ()
    yield Score(
        scorer=f"clipscore-{clip.arch}-{clip.weights[:8]}", benchmark=images.prompts.benchmark, value=overall,
        better="higher", groups=groups_, prompts=len(prompts), pictures=len(items), missing=images.missing, notes=notes,
        images=images.digest, prompt_list=images.prompts.digest,
        made_by=identity(network, "none") | {
            "model": args.model, "captions_cut": len(cut), "versions": {p: version(p) for p in PACKAGES},
        },
    ), items  # fmt: skip


def _captions(
    clip: Clip, prompts: list[Prompt], batch_size: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Normalised embedding of each prompt by its id, and the ids of those that were cut."""
    found: dict[str, Tensor] = {}
    cut: set[str] = set()
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        embeddings, were_cut = clip.captions([prompt.text for prompt in part])
        unit = torch.nn.functional.normalize(embeddings.double())
        found |= {prompt.id: one for prompt, one in zip(part, unit, strict=True)}
        cut |= {prompt.id for prompt, shortened in zip(part, were_cut, strict=True) if shortened}
    return found, cut


CLIPSCORE = Scorer(flags, _score, _ready)
