"""The frozen networks whose features are compared, and how each prepares a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import sha256_file

from ..errors import MissingWeights
from ..images.layouts import Picture
from ..images.ranks import check_device
from . import pretrained
from .crops import crop

INCEPTION = "inception-2015-12-05.pt"
# mean and deviation of RGB in [0, 1]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# (width, patch) of a vision transformer -> its usual name
NAMES = {
    (768, 32): "vit-b-32",
    (768, 16): "vit-b-16",
    (768, 14): "vit-b-14",
    (1024, 14): "vit-l-14",
}


@dataclass(frozen=True)
class Network:
    """Pictures to features of one width."""

    # with the architecture
    name: str
    weights: str  # their digest
    resize: str  # how a picture is prepared: an entry of `eval.features.crops`, or clean-fid's
    width: int
    prepare: Callable[[Picture], Tensor]  # (H, W, 3) -> (3, S, S), values 0 to 255
    features: Callable[[Tensor], Tensor]  # (B, 3, S, S) on the device -> (B, width)
    device: str = "cpu"


def inception(folder: Path | None, device: str = "cpu") -> Network:
    """Returns clean-fid's Inception and resize (float, antialiased, to a square).

    `folder` holds its weights; without one, clean-fid's own place, the folder of temporary files.
    """
    folder = folder or Path(tempfile.gettempdir())
    path = folder / INCEPTION
    from cleanfid.downloads_helper import inception_url

    if not path.is_file():
        raise MissingWeights(
            f"FID needs Inception's weights: found no {INCEPTION} in {folder}. Fetch {inception_url} on a machine "
            "with a network, copy the file here, and name its folder with --inception. Without them there is no FID"
        )
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    check_device(device)
    resize = build_resizer("clean")
    try:
        module = InceptionV3W(str(folder), download=False)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise pretrained.damaged(path, inception_url, error) from error
    module = module.to(device).eval()
    return Network(
        INCEPTION.removesuffix(".pt"), sha256_file(path), "clean299", 2_048,
        lambda picture: torch.from_numpy(resize(picture).transpose(2, 0, 1)), module, device,
    )  # fmt: skip


class Clip:
    """Both towers of a CLIP model."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self._module, self.weights = pretrained.model("CLIPModel", path, device)
        vision = self._module.config.vision_config
        self.size = int(vision.image_size)
        self.arch = architecture(vision)
        self.width = int(self._module.config.projection_dim)

    def network(self, resize: str) -> Network:
        """Returns the network of projected image embeddings, which are not normalised.

        `resize` is a crop's name without the size.
        """
        kind, _, rest = resize.partition("-")
        resize = f"{kind}{self.size}-{rest}"
        return Network(
            f"clip-{self.arch}", self.weights, resize, self.width, byte_pixels(resize), self.images, self.device
        )  # fmt: skip

    def images(self, pixels: Tensor) -> Tensor:
        """Returns projected embeddings (B, D) of pixels (B, 3, S, S) in [0, 255]."""
        pooled = self._module.vision_model(pixel_values=normalised(pixels, CLIP)).pooler_output
        return self._module.visual_projection(pooled)  # type: ignore[no-any-return]  # transformers is untyped

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Returns projected embeddings (B, D) on the CPU, and which captions were cut."""
        longest = self._module.config.text_config.max_position_embeddings
        uncut = self._tokenizer(list(texts))["input_ids"]
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt"
        ).to(self.device)
        pooled = self._module.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        embeddings = self._module.text_projection(pooled).float().cpu()
        return embeddings, [len(ids) > longest for ids in uncut]

    def load_tokenizer(self) -> None:
        """Loads what `captions` needs; MissingWeights where it has other tokens than the model."""
        self._tokenizer = pretrained.part("AutoTokenizer", self.path)
        expected, count = self._module.config.text_config.vocab_size, len(self._tokenizer)
        if count != expected:  # of a folder without a tokenizer, transformers makes an empty one
            raise MissingWeights(
                f"{self.path}: expected a tokenizer of the model's {expected} tokens, found {count} tokens. Copy "
                "tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json beside the weights"
            )


def dinov2(path: str, device: str = "cpu") -> Network:
    """Returns the network of DINOv2's normalised class token, prepared as dgm-eval does."""
    module, weights = pretrained.model("Dinov2Model", path, device)

    def features(pixels: Tensor) -> Tensor:
        output = module(pixel_values=normalised(pixels, IMAGENET))
        return output.pooler_output  # type: ignore[no-any-return]  # transformers is untyped

    resize, arch = "squash224-bicubic", architecture(module.config)
    width = int(module.config.hidden_size)
    return Network(f"dinov2-{arch}", weights, resize, width, byte_pixels(resize), features, device)


def architecture(vision: Any) -> str:
    """Returns a vision transformer's name from its config, whatever its folder is called."""
    width, patch = int(vision.hidden_size), int(vision.patch_size)
    name = NAMES.get((width, patch), f"vit-{width}-{patch}")
    plain = vision.image_size == 224 or vision.model_type == "dinov2"
    return name if plain else f"{name}-{vision.image_size}"


def byte_pixels(resize: str) -> Callable[[Picture], Tensor]:
    """Returns the function from a picture (H, W, 3) to its bytes (3, S, S), by a crop's name."""
    resized = crop(resize)
    return lambda picture: torch.from_numpy(resized(picture).transpose(2, 0, 1).copy())


def normalised(pixels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Returns pixels (B, 3, H, W) in [0, 255] normalised by statistics of values in [0, 1]."""
    mean, deviation = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in statistics)
    return (pixels.float() / 255 - mean) / deviation
