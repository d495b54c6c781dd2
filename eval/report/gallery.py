"""Pictures of the same prompts side by side, small enough for a page."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..images.imageset import ImageSetReader, PictureRef
from ..prompts.prompts import Prompt
from .pages import embed

Json = dict[str, Any]
SIDES = (256, 192, 128, 96, 64)  # of a thumbnail, in pixels: the first at which all fit
MOST_BYTES = 6_000_000  # of all thumbnails of a section


def shown_prompts(sets: Sequence[ImageSetReader], most: int) -> list[Prompt]:
    """The first prompts of each group that all sets have pictures of, at most `most`, in the order of the list.

    Nothing is picked by what it looks like. Without groups they are the first ones.
    """
    if not sets:
        return []
    has = [{(one.file.prompt.id, one.file.prompt.text) for one in images} for images in sets]
    common = [p for p in sets[0].prompts.items if all((p.id, p.text) in each for each in has)]
    groups: dict[str | None, list[Prompt]] = {}
    for prompt in common:
        groups.setdefault(prompt.group, []).append(prompt)
    if not groups:
        return []
    each = max(1, most // len(groups))
    chosen = [prompt for members in groups.values() for prompt in members[:each]][:most]
    place = {prompt.id: i for i, prompt in enumerate(common)}
    return sorted(chosen, key=lambda prompt: place[prompt.id])


def gallery(sets: Sequence[tuple[str, ImageSetReader]], most: int) -> list[Json]:
    """A record a prompt: its text, its group, and of each set its first picture as a data URI (named as given)."""
    prompts = shown_prompts([images for _, images in sets], most)
    wanted = {prompt.id for prompt in prompts}
    first = [_first(images, wanted) for _, images in sets]
    made: list[Json] = []
    for side in SIDES:
        made = [
            {
                "prompt": prompt.text, "group": prompt.group, "id": prompt.id,
                "pictures": [
                    {"set": i, "name": name, **_thumbnail(first[i][prompt.id], side)}
                    for i, (name, _) in enumerate(sets)
                ],
            }
            for prompt in prompts
        ]  # fmt: skip
        if sum(len(p["uri"]) for record in made for p in record["pictures"]) <= MOST_BYTES:
            break
    return made


def _first(images: ImageSetReader, wanted: set[str]) -> dict[str, PictureRef]:
    """Of each prompt the picture of the lowest number."""
    found: dict[str, PictureRef] = {}
    for one in images:
        if one.file.prompt.id in wanted:
            found.setdefault(one.file.prompt.id, one)
    return found


def _thumbnail(one: PictureRef, side: int) -> Json:
    """At most `side` pixels wide and high; a smaller picture stays as it is."""
    image = Image.fromarray(one.read())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    uri = embed(image, "WEBP", quality=80, method=4)
    return {"uri": uri, "width": image.width, "height": image.height, "number": one.number}
