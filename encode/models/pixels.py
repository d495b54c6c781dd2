"""Square crops of bytes <-> the pixels that a model takes and gives; a model's values -> the words that a
column stores.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """Scales (B, H, W, 3) uint8 -> (B, 3, H, W) fp32 in [-1, 1], as ToTensor, Normalize(0.5, 0.5)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
    return (x / 255 - 0.5) / 0.5


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Inverts it: (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded."""
    x = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def pixels_on(device: torch.device, images: NDArray[np.uint8]) -> Tensor:
    """Returns `to_pixels` on a device. Bytes are copied, and looked up in a table there: a GPU's own
    division would be off in the last bit.
    """
    if device.type == "cpu":
        return to_pixels(images)
    return pixels_from_table(torch.from_numpy(images).to(device))


def pixels_from_table(images: Tensor) -> Tensor:
    """Maps (B, H, W, 3) bytes -> (B, 3, H, W) fp32 in [-1, 1], bit for bit as `to_pixels`."""
    values = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    table = to_pixels(values)[:, 0, 0, 0].to(images.device)
    return table[images.permute(0, 3, 1, 2).int()]


def to_float16(values: Tensor) -> NDArray[np.float16]:
    """Returns fp32 as float16; what that cannot hold becomes infinite: the writer marks it NON_FINITE."""
    return values.to(torch.float16).cpu().numpy()


def bf16_words(values: Tensor) -> NDArray[np.uint16]:
    """Returns values in bfloat16, as the uint16 words that a column stores."""
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()
