"""Objects in a picture and their colours, for GenEval: Mask2Former and CLIP of transformers.

    pixels (H, W, 3) -> network's size -> class logits (Q, 81), mask logits (Q, h, w)
                     -> Segments at the picture's size

The processors of the checkpoints are not used: Mask2Former's shrinks pictures to 384 x 384 and
rounds masks to that grid. What is done instead is mmdet's test pipeline and its instance
post-processing, which the official scorer runs. CLIP gets open_clip's transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from ..errors import MissingWeights
from ..features import networks, pretrained
from ..images.layouts import Picture

# x1, y1, x2, y2 in pixels, y downwards; x2 and y2 lie behind the last pixel
Box = tuple[float, float, float, float]
CLASSES = 80  # COCO's
SHORTEST, LONGEST, DIVISOR = 800, 1333, 32
PAIRS = 100  # of query and class, the surest: mmdet's max_per_image
FLOOR = 0.1  # what scores less is not stored; the lowest official threshold is 0.3
GREY = 0x99
TEMPLATES = ("a photo of a {c} {o}", "a photo of a {c}-colored {o}", "a photo of a {c} object")


@dataclass(frozen=True)
class Segment:
    """An object: class number, score, box in pixels (ends behind the last), mask (H, W)."""

    kind: int
    score: float
    box: Box
    mask: NDArray[np.bool_]


class Detector:
    """Mask2Former over COCO's 80 classes."""

    def __init__(
        self, path: str, device: str, shortest: int = SHORTEST, longest: int = LONGEST
    ) -> None:
        self._model, weights = pretrained.model("Mask2FormerForUniversalSegmentation", path, device)
        if self._model.config.num_labels != CLASSES:
            raise MissingWeights(
                f"{path}: found {self._model.config.num_labels} classes, expected COCO's {CLASSES}. Give a model "
                "for COCO instances, such as facebook/mask2former-swin-small-coco-instance"
            )
        self._device, self._shortest, self._longest = device, shortest, longest
        self.identity = {
            "weights": weights, "shortest": shortest, "longest": longest, "divisor": DIVISOR,
            "resize": "bilinear, antialiased", "post": "mmdet instance", "floor": FLOOR,
        }  # fmt: skip

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture]) -> list[list[Segment]]:
        """Returns the objects of each picture; all have one size."""
        height, width = pictures[0].shape[:2]
        size = network_size(height, width, self._shortest, self._longest)
        pixels = torch.from_numpy(np.stack(pictures)).to(self._device).permute(0, 3, 1, 2).float()
        shown = prepared(pixels, size)
        out = self._model(pixel_values=shown)
        return [
            segments(classes.float(), masks.float(), tuple(shown.shape[-2:]), size, (height, width))
            for classes, masks in zip(
                out.class_queries_logits, out.masks_queries_logits, strict=True
            )
        ]


def network_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Returns (H, W), the largest with a shorter side to `shortest`, a longer to `longest`."""
    scale = min(shortest / min(height, width), longest / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepared(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns pixels (B, 3, H, W) in [0, 255] resized, normalised, padded below and right."""
    pixels = interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    margins = [ceil(side / DIVISOR) * DIVISOR - side for side in size]
    return pad(networks.normalised(pixels, networks.IMAGENET), (0, margins[1], 0, margins[0]))


def segments(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, ...],
    size: tuple[int, int],
    shape: tuple[int, int],
) -> list[Segment]:
    """Returns a picture's objects above FLOOR, from logits (Q, 81) and mask logits (Q, h, w).

    The masks are enlarged to the network's (padded) input, cut to what the picture filled of it,
    and brought to the picture's shape as logits. An object scores its class's probability x its
    mask's mean probability inside the mask, which is at most 1: so masks are enlarged only for
    pairs whose class may reach the floor.
    """
    likely, pair = (
        classes.softmax(-1)[:, :-1]
        .flatten()
        .topk(min(PAIRS, classes.shape[0] * (classes.shape[1] - 1)))
    )
    pair = pair[likely > FLOOR]
    if not len(pair):
        return []
    query, kind = pair // (classes.shape[1] - 1), pair % (classes.shape[1] - 1)
    queries, index = torch.unique(query, return_inverse=True)
    logits = interpolate(masks[queries][None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., : size[0], : size[1]]
    logits = interpolate(logits, shape, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    sure = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores = (likely[: len(pair)] * sure[index]).tolist()
    cut = inside.cpu().numpy()
    return [
        Segment(int(kind[i]), scores[i], box_of(cut[index[i]]), cut[index[i]])
        for i in range(len(pair))
        if scores[i] > FLOOR
    ]


def box_of(mask: NDArray[np.bool_]) -> Box:
    """Returns the tight box of a mask; zeros where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColourClassifier:
    """CLIP's likeness of an object to each of some colours."""

    def __init__(self, path: str, device: str, colours: Sequence[str]) -> None:
        self._clip, self._colours = networks.Clip(path, device), colours
        self._clip.load_tokenizer()
        self._network = self._clip.network("short-bicubic")  # open_clip's transform
        self._texts: dict[str, Tensor] = {}
        self.identity = {
            "weights": self._clip.weights, "templates": TEMPLATES, "background": "#999", "crop": True,
            "transform": f"open_clip, bicubic {self._clip.size}",
        }  # fmt: skip

    @torch.inference_mode()
    def __call__(
        self, picture: Picture, segments: Sequence[Segment], name: str
    ) -> list[tuple[float, ...]]:
        """Returns the cosines to the colours of each object of the class `name`."""
        pixels = torch.stack([self._network.prepare(cut_out(picture, s)) for s in segments])
        images = normalize(self._network.features(pixels.to(self._network.device)))
        return [tuple(row) for row in (images.float().cpu() @ self._text(name).T).tolist()]

    def _text(self, name: str) -> Tensor:
        """Returns (colours, D): the mean over the templates, normalised before and after."""
        if name not in self._texts:
            captions = [t.format(c=colour, o=name) for colour in self._colours for t in TEMPLATES]
            texts = normalize(self._clip.captions(captions)[0])
            self._texts[name] = normalize(
                texts.view(len(self._colours), len(TEMPLATES), -1).mean(1)
            )
        return self._texts[name]


def cut_out(picture: Picture, segment: Segment) -> Picture:
    """Returns the object over flat grey, cut to its box."""
    pixels = np.where(segment.mask[..., None], picture, np.uint8(GREY))
    x1, y1, x2, y2 = (int(end) for end in segment.box)
    return pixels[y1:y2, x1:x2]
