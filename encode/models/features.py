"""A frozen image encoder of transformers (DINOv2, SigLIP, CLIP vision): pixels -> features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from shards.format.atomic import Json

from ..errors import ModelNotUsable
from ..registry import ModelSpec, check_weights, location
from .weights import autocast, load_model, trying, tune, weights_digest


class FeatureEncoder:
    """An image model with the size, mean and standard deviation of the pictures it takes."""

    def __init__(
        self, model: ModelSpec, *, output: Literal["tokens", "pooled"] = "tokens",
        resolution: int | None = None, mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None, device: str = "cpu", expected: str | None = None,
        compiled: bool = False, channels_last: bool = False,
    ) -> None:  # fmt: skip
        """Load it; ModelNotUsable if the weights are not the `expected` ones, or if the size, mean
        or deviation is said neither here nor in the model's preprocessor_config.json.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        self.model, self.device, self.output = model, torch.device(device), output
        said = preprocessing(model) if None in (resolution, mean, std) else {}
        self.resolution = resolution or _needed(said, "resolution", model.path)
        self.mean = list(map(float, mean or _needed(said, "mean", model.path)))
        self.std = list(map(float, std or _needed(said, "std", model.path)))
        module = load_model(transformers, model)
        self._module = getattr(module, "vision_model", module)  # of a pair of towers, its eyes
        self.weights = weights_digest(self._module)
        check_weights(self.weights, expected, model.path)
        self._module.to(self.device)
        tune(self._module, self._module, compiled, channels_last)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, R, R) in [-1, 1] -> fp32 features: tokens (B, N, D), or pooled (B, D)."""
        mean, std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        x = ((pixels.to(self.device, torch.float32) + 1) / 2 - mean) / std
        with autocast(self.model.precision, self.device):
            output = self._module(pixel_values=x)
        name = "last_hidden_state" if self.output == "tokens" else "pooler_output"
        found = getattr(output, name, None)
        if found is None:
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives no {name}. Use output: "
                f"{'pooled' if self.output == 'tokens' else 'tokens'}, or another class"
            )
        return found.float()  # type: ignore[no-any-return]  # transformers is untyped

    def shape(self) -> tuple[int, ...]:
        """(N, D) or (D,), found by encoding a grey picture; ModelNotUsable if that fails."""
        side = self.resolution
        with trying(
            f"{self.model.path}: {self.model.cls} cannot encode pictures of {side} x {side} pixels",
            "Give an image model and its size",
        ):
            return tuple(self.encode(torch.zeros(1, 3, side, side)).shape[1:])


def preprocessing(model: ModelSpec) -> Json:
    """What a model's preprocessor_config.json says: any of resolution, mean and std."""
    import transformers

    try:
        found, _ = transformers.BaseImageProcessor.get_image_processor_dict(
            location(model.path), revision=model.revision, subfolder=model.subfolder or ""
        )
    except OSError:
        return {}
    said: Json = {}
    for place, used in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size: Any = found.get(place)
        if isinstance(size, dict):
            sides = {size[k] for k in ("height", "width", "shortest_edge") if size.get(k)}
            size = sides.pop() if len(sides) == 1 else None
        if size and found.get(used, True) is not False:
            said.setdefault("resolution", int(size))
    if not found.get("do_normalize", True):
        return said | {"mean": [0.0] * 3, "std": [1.0] * 3}
    if abs(found.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        return said  # its mean and deviation are of another range of values than 0 to 1
    named = {name: found.get(f"image_{name}") for name in ("mean", "std")}
    return said | {name: value for name, value in named.items() if value is not None}


def _needed(said: Json, name: str, path: str) -> Any:
    if name not in said:
        raise ModelNotUsable(
            f"{path}: its preprocessor_config.json says no {name} (found {said or 'nothing'}). "
            f"Say {name} in the column"
        )
    return said[name]
