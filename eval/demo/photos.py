"""The demo's second source: crops of seven photographs from two packages, captions written by hand.

Licences: scikit-image's `data/README.txt` (astronaut and rocket are NASA's and SpaceX's, public domain;
chelsea and coffee CC0; motorcycle from the Middlebury stereo benchmark) and scikit-learn's
`datasets/images/README.txt` (china.jpg and flower.jpg, CC BY, by Grace Ou and vultilion).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SHORT_SIDE = 96  # pixels of a stored crop

# photograph -> (package, file, short caption); both files are in the wheels, nothing is downloaded
FILES = {
    "astronaut": ("skimage", "data/astronaut.png", "an astronaut"),
    "cat": ("skimage", "data/chelsea.png", "a cat"),
    "coffee": ("skimage", "data/coffee.png", "a cup of coffee"),
    "rocket": ("skimage", "data/rocket.jpg", "a rocket"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "a motorcycle"),
    "china": ("sklearn", "datasets/images/china.jpg", "a Chinese pavilion"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "a dahlia"),
}

# photograph -> [(left, upper, right, lower) in pixels, caption]
CROPS: dict[str, list[tuple[tuple[int, int, int, int], str]]] = {
    "astronaut": [
        ((0, 0, 512, 512), "An astronaut in an orange suit before a flag and a model shuttle."),
        ((60, 0, 380, 320), "A smiling astronaut with short blond hair in an orange suit."),
        ((120, 0, 330, 210), "Portrait of a smiling woman in the collar of a space suit."),
        ((330, 0, 490, 290), "A model of the space shuttle with its brown tank."),
        ((20, 230, 372, 512), "The orange suit of an astronaut with a round blue patch."),
        ((270, 330, 512, 512), "A white and black space helmet."),
    ],
    "cat": [
        ((0, 0, 451, 300), "A tabby cat looking to the side."),
        ((90, 0, 390, 300), "The face of a tabby cat with green eyes."),
        ((130, 60, 260, 160), "One green eye of a tabby cat."),
        ((210, 140, 350, 280), "The nose and mouth of a tabby cat."),
        ((0, 30, 220, 300), "The striped cheek and whiskers of a cat."),
        ((150, 0, 451, 220), "A cat's eyes and ear before a blurred room."),
    ],
    "coffee": [
        ((0, 0, 600, 400), "A red cup of coffee on a red saucer on a wooden table."),
        ((120, 0, 460, 340), "A red cup of espresso seen from above."),
        ((180, 20, 400, 220), "Espresso in a white cup."),
        ((290, 190, 480, 380), "A steel spoon on a red saucer."),
        ((80, 150, 380, 400), "The handle of a red cup and its saucer."),
        ((400, 0, 600, 260), "The grain of a brown wooden table beside a saucer."),
    ],
    "rocket": [
        ((0, 0, 640, 427), "A rocket on its launch pad between four towers at dusk."),
        ((200, 60, 440, 427), "A white rocket standing upright against a dark blue sky."),
        ((270, 100, 370, 300), "The upper part of a white rocket."),
        ((90, 300, 420, 427), "Bright lamps at the foot of a rocket."),
        ((0, 0, 220, 427), "Lightning towers of steel against the evening sky."),
        ((420, 0, 640, 400), "A lattice tower at the right of a launch pad at dusk."),
    ],
    "motorcycle": [
        ((0, 0, 741, 500), "A red motorcycle parked in a garage."),
        ((90, 70, 700, 470), "A red motorcycle seen from the side."),
        ((480, 220, 700, 470), "The front wheel and red mudguard of a motorcycle."),
        ((110, 210, 300, 410), "The rear wheel of a motorcycle."),
        ((250, 170, 510, 430), "The engine and red tank of a motorcycle."),
        ((330, 0, 741, 210), "Cardboard boxes on shelves in a garage."),
    ],
    "china": [
        ((0, 0, 640, 427), "A Chinese pavilion with tiled roofs above a lake."),
        ((50, 20, 380, 420), "A tower with four roofs of orange and green tiles."),
        ((90, 20, 310, 200), "The top roofs of a Chinese pavilion against the sky."),
        ((80, 150, 330, 350), "Red columns between the tiled roofs of a pavilion."),
        ((300, 110, 640, 427), "Green trees before a wide pale lake."),
        ((380, 0, 640, 240), "A pale sky above a lake with an island."),
    ],
    "flower": [
        ((0, 0, 640, 427), "An orange dahlia before dark green leaves."),
        ((150, 70, 460, 380), "A round dahlia with many orange petals."),
        ((230, 150, 390, 310), "The red centre of an orange dahlia."),
        ((160, 80, 320, 240), "Pale orange petals of a dahlia."),
        ((0, 0, 260, 427), "Blurred dark green leaves with an orange petal."),
        ((260, 250, 640, 427), "Two dahlias, one cut by the lower edge."),
    ],
}


@dataclass(frozen=True)
class Photo:
    """One crop with its two captions."""

    key: str
    short: str
    long: str
    file: Path
    box: tuple[int, int, int, int]

    def jpeg(self) -> bytes:
        """Returns the crop with its short side at 96 pixels, not square on purpose."""
        with Image.open(self.file) as photograph:
            crop = photograph.convert("RGB").crop(self.box)
        scale = SHORT_SIDE / min(crop.size)
        size = (round(crop.width * scale), round(crop.height * scale))
        out = io.BytesIO()
        crop.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=95)
        return out.getvalue()


def photos() -> Iterator[Photo]:
    """Yields all crops, photograph by photograph."""
    for name, (package, file, short) in FILES.items():
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / file
        for number, (box, caption) in enumerate(CROPS[name]):
            yield Photo(f"photo-{name}-{number}", short, caption, path, box)
