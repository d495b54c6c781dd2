"""Pictures of the same prompts side by side, small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image

from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..prompts.prompts import Prompt

Json = dict[str, Any]
T = TypeVar("T")
# of a picture on the page, in pixels: the first at which all fit
SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
MOST_BYTES = 6_000_000  # of all pictures of a section


def gallery(
    sets: Sequence[tuple[str, ImageSetReader]],
    most: int,
    psnr: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Json]:
    """Returns for each of `most` prompts its text, its group, and each named set's first picture of it
    as a data URI. `psnr`: values in dB by set and prompt, of which the prompts with the worst are shown.
    """
    if not sets:
        return []
    values = psnr or {}
    first_pictures = [_first_pictures(images) for _, images in sets]
    common = [
        p for p in sets[0][1].prompts.items if all((p.id, p.text) in f for f in first_pictures)
    ]
    prompts = worst(common, most, values) if any(values.values()) else spread(common, most)
    records: list[Json] = []
    for side in SIDES:
        records, size = [], 0
        for prompt in prompts:
            shown = [
                {
                    "set": i,
                    "name": name,
                    "psnr": values.get(name, {}).get(prompt.id),
                    **_thumbnail(pictures[prompt.id, prompt.text], side),
                }
                for i, ((name, _), pictures) in enumerate(zip(sets, first_pictures, strict=True))
            ]
            records.append(
                {"prompt": prompt.text, "group": prompt.group, "id": prompt.id, "pictures": shown}
            )
            size += sum(len(p["uri"]) for p in shown)
            if size > MOST_BYTES and side != SIDES[-1]:
                break  # the next smaller side
        else:
            break
    return records


def _first_pictures(images: ImageSetReader) -> dict[tuple[str, str], PictureRef]:
    """Returns each prompt's picture of the lowest number, by the prompt's id and text."""
    first: dict[tuple[str, str], PictureRef] = {}
    for picture in images:
        first.setdefault((picture.file.prompt.id, picture.file.prompt.text), picture)
    return first


def worst(
    prompts: Sequence[Prompt], most: int, values: Mapping[str, Mapping[str, float]]
) -> list[Prompt]:
    """Returns the `most` prompts whose lowest value of any set is lowest, in this order; those without
    a value are left out.
    """
    lowest: dict[str, float] = {}
    for by_prompt in values.values():
        for prompt, value in by_prompt.items():
            lowest[prompt] = min(value, lowest.get(prompt, value))
    return sorted((p for p in prompts if p.id in lowest), key=lambda p: lowest[p.id])[:most]


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Returns `most` prompts in the order of the list: from all groups alike, and of each group every
    n-th. Where there are more groups than `most`, every n-th group has one.

    They are picked by their place alone, never by what their pictures look like.
    """
    groups: dict[str | None, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt.id)
    members = _every_nth(list(groups.values()), most)
    counts, left = [0] * len(members), min(most, sum(map(len, members)))
    while left:
        for i, names in enumerate(members):
            if left and counts[i] < len(names):
                counts[i], left = counts[i] + 1, left - 1
    chosen = {
        name
        for names, count in zip(members, counts, strict=True)
        for name in _every_nth(names, count)
    }
    return [prompt for prompt in prompts if prompt.id in chosen]


def _every_nth(items: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` items, evenly apart, from the middle of each part of the sequence."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _thumbnail(picture: PictureRef, side: int) -> Json:
    return {**thumbnail(picture.read(), side), "number": picture.number}


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
