"""A frozen image encoder of transformers (DINOv2, SigLIP, CLIP vision): pixels -> features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.format import PicturePreprocess
from shards.format.atomic import Json

from ..config import FeaturesColumn
from ..errors import ModelNotUsable
from ..registry import FEATURES, ModelSpec, location, lookup
from ..source.decoding import View
from .encoder import ImageEncoder, Words
from .pixels import bf16_words, pixels_on, to_float16
from .weights import autocast, load_model, tune


class FeatureEncoder(ImageEncoder):
    """An image model with the size, mean and standard deviation of the pictures it takes."""

    config: FeaturesColumn

    def __init__(
        self, config: FeaturesColumn, device: str = "cpu", expected: str | None = None, *,
        compiled: bool = False, channels_last: bool = False,
    ) -> None:  # fmt: skip
        """Loads it; ModelNotUsable if the weights are not the `expected` ones, or if size, mean or
        deviation is neither in the column nor in the model's preprocessor_config.json.
        """
        self.config, self.model = config, lookup(config.encoder, FEATURES)
        self.device, path = torch.device(device), self.model.path
        fields = (config.resolution, config.mean, config.std)
        file = preprocessing(self.model) if None in fields else {}
        resolution = config.resolution or _needed(file, "resolution", path)
        self.mean = list(map(float, config.mean or _needed(file, "mean", path)))
        self.std = list(map(float, config.std or _needed(file, "std", path)))
        self.view = View(resolution, config.suffix)
        # of a pair of towers, the one of pictures
        self._module, self.weights = load_model(
            "transformers", self.model, device, expected=expected, part="vision_model"
        )
        tune(self._module, self._module, compiled, channels_last)

    def preprocess(self, **fields: Any) -> PicturePreprocess:
        return super().preprocess(mean=self.mean, std=self.std, output=self.config.output, **fields)

    def rows(self, images: NDArray[np.uint8]) -> Words:
        features = self.encode(pixels_on(self.device, images))
        return bf16_words(features) if self.config.element == "bfloat16" else to_float16(features)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, R, R) in [-1, 1] -> fp32 features: tokens (B, N, D), or pooled (B, D)."""
        mean, std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        x = ((pixels.to(self.device, torch.float32) + 1) / 2 - mean) / std
        with autocast(self.model.precision, self.device):
            output = self._module(pixel_values=x)
        tokens = self.config.output == "tokens"
        name = "last_hidden_state" if tokens else "pooler_output"
        features = getattr(output, name, None)
        if features is None:
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives no {name}. Use output: "
                f"{'pooled' if tokens else 'tokens'}, or another class"
            )
        return features.float()  # type: ignore[no-any-return]  # transformers is untyped


def preprocessing(model: ModelSpec) -> Json:
    """Returns what a model's preprocessor_config.json says: any of resolution, mean and std."""
    import transformers

    try:
        config, _ = transformers.BaseImageProcessor.get_image_processor_dict(
            location(model.path), revision=model.revision, subfolder=model.subfolder or ""
        )
    except OSError:  # not there, or no JSON
        return {}
    values: Json = {}
    for key, switch in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size: Any = config.get(key)
        if isinstance(size, dict):
            sides = {size[k] for k in ("height", "width", "shortest_edge") if size.get(k)}
            size = sides.pop() if len(sides) == 1 else None
        if size and config.get(switch, True) is not False:
            values.setdefault("resolution", int(size))
    if not config.get("do_normalize", True):
        return values | {"mean": [0.0] * 3, "std": [1.0] * 3}
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        return values  # its mean and deviation are of another range of values than 0 to 1
    named = {name: config.get(f"image_{name}") for name in ("mean", "std")}
    return values | {name: value for name, value in named.items() if value is not None}


def _needed(values: Json, name: str, path: str) -> Any:
    if name not in values:
        raise ModelNotUsable(
            f"{path}: its preprocessor_config.json says no {name} (found {values or 'nothing'}). "
            f"Say {name} in the column"
        )
    return values[name]
