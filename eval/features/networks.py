"""The frozen networks whose features are compared, loaded by name or from a local path and never downloaded silently.

Each says how a picture is prepared for it, and which weights it has by their digest.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encode.errors import ModelNotUsable
from encode.models.weights import load_model
from encode.registry import ModelSpec, location, one_line
from shards import sha256_file

from ..errors import MissingWeights
from ..images.layouts import Picture
from .crops import crop

INCEPTION = "inception-2015-12-05.pt"
CLIP = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # mean, deviation
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

    name: str  # with the architecture
    weights: str  # their digest
    resize: str  # how a picture is prepared: an entry of `eval.features.crops`, or clean-fid's
    width: int
    prepare: Callable[[Picture], Tensor]  # (H, W, 3) -> (3, S, S), values 0 to 255
    features: Callable[[Tensor], Tensor]  # (B, 3, S, S) on the device -> (B, width)
    device: str = "cpu"


def inception(folder: Path | None, device: str = "cpu") -> Network:
    """clean-fid's Inception and resize (float, antialiased, the aspect ratio not kept), from a folder that holds its
    weights."""
    where = folder or Path(tempfile.gettempdir())  # clean-fid's own place
    path = where / INCEPTION
    if not path.is_file():
        from cleanfid import downloads_helper

        raise MissingWeights(
            f"FID needs Inception's weights: found no {INCEPTION} in {where}. Fetch "
            f"{downloads_helper.inception_url} on a machine with a network, copy the file here, and name its folder "
            "with --inception. Without them there is no FID"
        )
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    module = InceptionV3W(str(where), download=False).to(device).eval()
    return Network(
        INCEPTION.removesuffix(".pt"), sha256_file(path), "clean299", 2_048,
        lambda picture: torch.from_numpy(resize(picture).transpose(2, 0, 1)), module, device,
    )  # fmt: skip


class Clip:
    """Both towers of a CLIP model."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self._module, self.weights = _load("CLIPModel", path, device)
        vision = self._module.config.vision_config
        self.size = int(vision.image_size)
        self.arch = architecture(vision)
        self.width = int(self._module.config.projection_dim)

    def network(self, resize: str) -> Network:
        """Projected image embeddings, not normalised; `resize` is a crop's name without the size."""
        kind, _, rest = resize.partition("-")
        name = f"{kind}{self.size}-{rest}"
        prepare = _bytes(name)
        return Network(
            f"clip-{self.arch}", self.weights, name, self.width, prepare, self.images, self.device
        )

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), 0 to 255 -> (B, D)."""
        pooled = self._module.vision_model(pixel_values=normalised(pixels, CLIP)).pooler_output
        return self._module.visual_projection(pooled)  # type: ignore[no-any-return]  # transformers is untyped

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Projected embeddings (B, D) on the CPU, and which captions were cut at the model's length."""
        longest = self._module.config.text_config.max_position_embeddings
        whole = self._tokenizer(list(texts))["input_ids"]
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt"
        ).to(self.device)
        pooled = self._module.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return self._module.text_projection(pooled).float().cpu(), [
            len(ids) > longest for ids in whole
        ]

    def load_tokenizer(self) -> None:
        """Before `captions`. MissingWeights where it has other tokens than the model; of a folder without one,
        transformers makes an empty one."""
        import transformers

        expected = self._module.config.text_config.vocab_size
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(location(self.path))
            found = f"{len(self._tokenizer)} tokens"
        except (OSError, ValueError, KeyError) as error:
            found = one_line(error)
        if found != f"{expected} tokens":
            raise MissingWeights(
                f"{self.path}: expected a tokenizer of the model's {expected} tokens, found {found}. Copy "
                "tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json beside the weights"
            )


def dinov2(path: str, device: str = "cpu") -> Network:
    """The normalised class token of a DINOv2 model, pictures squashed to 224 x 224 as dgm-eval does."""
    module, weights = _load("Dinov2Model", path, device)

    def features(pixels: Tensor) -> Tensor:
        found = module(pixel_values=normalised(pixels, IMAGENET))
        return found.pooler_output  # type: ignore[no-any-return]  # transformers is untyped

    resize, arch = "squash224-bicubic", architecture(module.config)
    width = int(module.config.hidden_size)
    return Network(f"dinov2-{arch}", weights, resize, width, _bytes(resize), features, device)


def architecture(vision: Any) -> str:
    """A vision transformer's name from its config, whatever its folder is called."""
    width, patch = int(vision.hidden_size), int(vision.patch_size)
    name = NAMES.get((width, patch), f"vit-{width}-{patch}")
    plain = vision.image_size == 224 or vision.model_type == "dinov2"
    return name if plain else f"{name}-{vision.image_size}"


def _load(cls: str, path: str, device: str) -> tuple[Any, str]:
    try:
        return load_model(
            "transformers", ModelSpec.model_validate({"class": cls, "path": path}), device
        )
    except ModelNotUsable as error:
        raise MissingWeights(
            f"{error}. Where there is no network: `hf download {path} --local-dir FOLDER` on a machine that has one, "
            "copy the folder here, and name it with --model. Without these weights there is no such score"
        ) from None


def _bytes(name: str) -> Callable[[Picture], Tensor]:
    act = crop(name)
    return lambda picture: torch.from_numpy(act(picture).transpose(2, 0, 1).copy())


def normalised(pixels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Returns pixels (B, 3, H, W) in [0, 255] less a mean and over a deviation of values in [0, 1]."""
    mean, deviation = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in statistics)
    return (pixels.float() / 255 - mean) / deviation
