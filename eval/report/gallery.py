"""Pictures of the same prompts side by side, small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from shards import charts

from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..prompts.prompts import Prompt
from .orders import Choice, PromptScores, choose, distance

Json = dict[str, Any]
# of a picture on the page, in pixels: the first at which all fit
SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
FEW = 4  # prompts after which pictures twice too large are given up for the next smaller side
MOST_BYTES = 6_000_000  # of all pictures of a section
LOST_TIMES = 4  # by which what a reconstruction lost is made visible


@dataclass(frozen=True)
class Gallery:
    """Pictures of the same prompts side by side, in the first of some orders.

    A record of `pictures` is a prompt: prompt, group, id, ranks (its place in each of `orders`) and
    pictures: set, name, note, uri, width, height, full, number, and of a reconstruction `lost`.
    """

    chosen: str = ""  # how the prompts were chosen
    pictures: list[Json] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)


ByPrompt = Mapping[tuple[str, str], PictureRef]  # the picture of a prompt's id and text


@dataclass(frozen=True)
class _Shown:
    """What a gallery is of, by the name of the set."""

    first: Mapping[str, ByPrompt]
    whole: Mapping[str, ByPrompt]  # originals of reconstructions
    psnr: Mapping[str, Mapping[str, float]]
    scores: PromptScores | None

    @property
    def all(self) -> list[ByPrompt]:
        return [*self.first.values(), *self.whole.values()]

    def has(self, prompt: Prompt) -> bool:
        """Whether all pictures of a prompt exist: those of a study may have been removed."""
        return all((prompt.id, prompt.text) in pictures for pictures in self.all)

    def note(self, name: str, prompt: Prompt) -> str:
        """Returns the number below a set's picture of a prompt."""
        if (value := self.psnr.get(name, {}).get(prompt.id)) is not None:
            return f"{value:.1f} dB"
        scores = self.scores.by_entry.get(name, {}) if self.scores else {}
        return charts.figure(scores[prompt.id]) if prompt.id in scores else ""


def gallery(
    sets: Sequence[tuple[str, ImageSetReader]],
    most: int,
    *,
    psnr: Mapping[str, Mapping[str, float]] | None = None,
    scores: PromptScores | None = None,
    originals: Mapping[str, ImageSetReader] | None = None,
    by_difference: bool = False,
    most_bytes: int | None = None,
) -> Gallery:
    """Returns each named set's first picture of at most `most` prompts that all have, as data URIs of
    `most_bytes` (else MOST_BYTES) in all: smaller pictures, and at the smallest fewer prompts.

    `psnr`: values in dB by set and prompt, of which the prompts with the worst are shown. `scores`:
    half of the prompts are those in which the entries differ most. Without either, prompts are
    picked by their place, and with `by_difference` the most different pictures come first.
    `originals`, by set: what is lost of them is shown below the set's pictures.
    """
    if not sets or not most:
        return Gallery()
    shown = _Shown(
        {name: _first_pictures(images) for name, images in sets},
        {name: _first_pictures(images) for name, images in (originals or {}).items()},
        psnr or {},
        scores,
    )
    readers = [images for _, images in sets] + list((originals or {}).values())
    had = [
        {(p.id, p.text) for p in images.prompts.items} if images.removed else pictures.keys()
        for images, pictures in zip(readers, shown.all, strict=True)
    ]
    common = [p for p in readers[0].prompts.items if all((p.id, p.text) in keys for keys in had)]
    apart = partial(_apart, shown.first) if len(sets) > 1 else None
    sides, asked, wanted = list(SIDES), min(most, len(common)), 0
    budget = most_bytes or MOST_BYTES
    while asked:
        choice = choose(
            common,
            asked,
            psnr=shown.psnr,
            scores=scores,
            apart=apart,
            by_difference=by_difference,
            exists=shown.has,
        )
        wanted = wanted or len(choice.prompts)
        records = list[Json]()
        for side in sides:
            records = _records(choice, shown, side, budget)
            if len(records) == len(choice.prompts):
                return _ordered(records, choice, wanted, bool(originals))
        sides, asked = sides[-1:], len(records)  # as many as there is room for, chosen again
    return Gallery()


def _apart(first: Mapping[str, ByPrompt], prompt: Prompt) -> float:
    """Returns how far the sets' pictures of a prompt are apart."""
    return distance([by_prompt[prompt.id, prompt.text].read() for by_prompt in first.values()])


def _records(choice: Choice, shown: _Shown, side: int, most_bytes: int) -> list[Json]:
    """Returns the records of the first prompts whose pictures, of at most `side` pixels, have room."""
    records, size = list[Json](), 0
    for prompt in choice.prompts:
        pictures, key = list[Json](), (prompt.id, prompt.text)
        for i, (name, by_prompt) in enumerate(shown.first.items()):
            picture, lost = by_prompt[key].read(), ""
            if name in shown.whole:
                original = shown.whole[name][key].read()
                lost = thumbnail(_lost(picture, original), side)["uri"]
            record = {"set": i, "name": name, "note": shown.note(name, prompt), "lost": lost}
            pictures.append(record | thumbnail(picture, side) | {"number": by_prompt[key].number})
        size += sum(len(record["uri"]) + len(record["lost"]) for record in pictures)
        count = len(records) + 1
        hopeless = count >= FEW and size / count * len(choice.prompts) > 2 * most_bytes
        if size > most_bytes or (hopeless and side > SIDES[-1]):
            break
        records.append(
            {
                "prompt": prompt.text,
                "group": prompt.group,
                "id": prompt.id,
                "pictures": pictures,
                "sample": prompt.id in choice.sample,
            }
        )
    return records


def _ordered(records: Sequence[Json], choice: Choice, asked: int, lost: bool) -> Gallery:
    """Returns the records in the first of the orders, each with its ranks in all."""
    ranks = choice.ranks()
    pictures = [record | {"ranks": ranks[record["id"]]} for record in records]
    less = len(choice.prompts)
    text = choice.chosen
    if lost:
        text += (
            f" Under a reconstruction is what it lost: {LOST_TIMES} times the absolute difference from the original, "
            "black where there is none."
        )
    if less < asked:
        text += f" {asked:,} were asked for; there is room for {less:,}."
    return Gallery(
        text, sorted(pictures, key=lambda record: record["ranks"][0]), list(choice.orders)
    )


def _lost(picture: Picture, original: Picture) -> Picture:
    """Returns LOST_TIMES the absolute difference of two pictures (H, W, 3)."""
    difference = np.abs(picture.astype(np.int16) - original.astype(np.int16))
    lost: Picture = np.minimum(LOST_TIMES * difference, 255).astype(np.uint8)
    return lost


def _first_pictures(images: ImageSetReader) -> ByPrompt:
    """Returns each prompt's picture of the lowest number, by the prompt's id and text."""
    first: dict[tuple[str, str], PictureRef] = {}
    for picture in images:
        first.setdefault((picture.file.prompt.id, picture.file.prompt.text), picture)
    return first


def thumbnail(picture: Picture, side: int) -> Json:
    """Returns `uri`, `width` and `height` of a picture (H, W, 3) in at most `side` x `side` pixels; a
    smaller one keeps its size. `full` is the picture's own size where it is larger, else empty.
    """
    image = Image.fromarray(picture)
    size = image.size
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=80, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    full = f"{size[0]} x {size[1]}" if image.size != size else ""
    return {"uri": uri, "width": image.width, "height": image.height, "full": full}
