"""An encoder is tried before anything is written: what would fail in a run, or store wrong values, is
refused here.

    captions   one of as many tokens as are kept, a short one and the empty one
    pictures   noise and a gradient; a VAE decodes one, too

Both are encoded together, twice, and then one by one, in batches as the run makes them. So too few
positions, tokens that the model has no embedding of, random numbers and rows that depend on their batch
show at once. It takes a few batches. Workers skip it: the driver has tried the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.format import to_floats

from ..config import EngineConfig
from ..errors import ModelNotUsable
from ..registry import ModelSpec
from .encoder import CaptionEncoder, Encoder, ImageEncoder, Words
from .text import TextEncoder
from .tokenizer import PROBE, CaptionTokenizer
from .vae import Vae
from .weights import trying

SHORT = "a cat"
# What a batch may change of a channel or token: L2 norm of the change over that of the values. Measured
# on random models of 2 to 24 layers, weights up to three times as large: fp32 5e-4 (sums in another
# order, stored as bfloat16; a GPU may choose another algorithm, with TF32's 2^-11), bf16-autocast 0.045,
# and 0.18 to 1.3 where padding is attended to.
TOLERANCE = {"fp32": 2.0**-6, "bf16-autocast": 2.0**-3}


def rehearse(encoder: Encoder, engine: EngineConfig) -> None:
    """Raises ModelNotUsable if the encoder cannot fill its column."""
    model = encoder.model
    device = encoder.device or torch.device("cpu")
    if isinstance(encoder, ImageEncoder):
        side = encoder.view.resolution
        images = pictures(side)[: engine.batch]
        with trying(f"{model.path}: {model.cls} cannot encode pictures of {side} x {side} pixels"):
            _ = encoder.row_shape
            compare(
                model, device, lambda n: list(encoder.rows(images[n])), len(images), "a picture"
            )
        if isinstance(encoder, Vae):
            encoder.refuse_decoder()
        return
    assert isinstance(encoder, CaptionEncoder)
    tokenizer = encoder.tokenizer if isinstance(encoder, TextEncoder) else encoder
    assert isinstance(tokenizer, CaptionTokenizer)
    captions = [long_caption(tokenizer), SHORT, ""]
    check_captions(tokenizer, captions)
    limit = tokenizer.limit
    with trying(
        f"{model.path}: {model.cls} cannot encode captions of up to {limit} tokens",
        "Lower max_tokens if the model has fewer positions; else check class and path",
    ):
        compare(
            model, device, lambda n: encoder.rows([captions[i] for i in n], engine.tokens),
            len(captions), "a caption",
        )  # fmt: skip


def pictures(side: int) -> NDArray[np.uint8]:
    """Returns two pictures that have little in common, (2, side, side, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    grey = np.broadcast_to(ramp[:, None, None], noise.shape)
    return np.stack([noise, grey])


def long_caption(tokenizer: CaptionTokenizer) -> str:
    """Returns a caption of at least as many tokens as are kept."""
    return " ".join([PROBE] * (tokenizer.limit // len(PROBE.split()) + 1))


def check_captions(tokenizer: CaptionTokenizer, captions: Sequence[str]) -> None:
    """Raises ModelNotUsable where tokens depend on the day, or not on the caption, or are too many."""
    path, limit = tokenizer.model.path, tokenizer.limit
    if tokenizer.dated:
        raise ModelNotUsable(
            f"{path}: its chat template writes the date (strftime_now), so the same caption has "
            "other tokens on another day. Put a fixed date into the template, save the tokenizer "
            "to a folder and give that, or use template or instruction in place of chat_template"
        )
    rows = tokenizer(captions)
    if (most := max(map(len, rows))) > limit:
        raise ModelNotUsable(
            f"{path}: its tokenizer makes {most} tokens where {limit} are asked for: it puts more "
            "than that around each caption. Raise max_tokens"
        )
    if rows[0] == rows[1]:
        raise ModelNotUsable(
            f"{path}: all captions have the same {len(rows[0])} tokens: what the template puts "
            f"before them leaves no room in max_tokens: {tokenizer.config.max_tokens}. Raise max_tokens, "
            "or shorten the template"
        )


def compare(
    model: ModelSpec, device: torch.device, encode: Callable[[Sequence[int]], Sequence[Words]],
    count: int, noun: str,
) -> None:  # fmt: skip
    """Encodes inputs together, twice, then one by one; ModelNotUsable if a row differs by more than
    rounding. The second time it may not differ at all, but for kernels of a GPU that add up in any
    order.
    """
    rounding = TOLERANCE[model.precision]
    states = random_states(device)
    first, second = encode(range(count)), encode(range(count))
    on_gpu = device.type == "cuda" and random_states(device) == states
    if max(map(difference, first, second)) > (rounding if on_gpu else 0):
        raise ModelNotUsable(
            f"{model.path}: {model.cls} gives {noun} other values each time: it draws random numbers "
            "(ViTMAEModel hides parts of a picture at random, a tokenizer with dropout cuts words at "
            "random). Use a class that does not, such as ViTModel, or switch the dropout off"
        )
    largest = max(difference(row, encode([i])[0]) for i, row in enumerate(first))
    if largest > rounding:
        raise ModelNotUsable(
            f"{model.path}: {model.cls} gives {noun} other values in a batch than alone (they differ by "
            f"{largest:.2g} of their size, rounding by {rounding:.2g} at most): a row would depend on its "
            "neighbours, as where padding is not masked. Use another class, or encode one by one: "
            "engine.batch=1 and engine.tokens=1"
        )


def difference(row: Words, other: Words) -> float:
    """Returns how far two encodings of one input are apart: over channels or tokens, the largest L2
    norm of the difference over that of the values. Infinite where shapes or token ids differ.
    """
    if row.dtype == np.int32 or row.shape != other.shape:
        return 0.0 if np.array_equal(row, other) else np.inf
    a, b = flat(row), flat(other)
    norms = np.linalg.norm(a, axis=1)
    # a channel that is almost zero everywhere is not measured by its own size
    floor = max(float(np.median(norms)) / 8, 1e-30)
    return float((np.linalg.norm(a - b, axis=1) / np.maximum(norms, floor)).max(initial=0))


def flat(words: Words) -> NDArray[np.float64]:
    """Returns (channels or tokens, values) of one row, with large numbers for NaN and infinity."""
    values = to_floats(words) if words.dtype == np.uint16 else words
    rows = np.asarray(values, np.float64).reshape(len(words) if words.ndim > 1 else 1, -1)
    return np.nan_to_num(rows, nan=1e5, posinf=1e5, neginf=-1e5)


def random_states(device: torch.device) -> list[Any]:
    """Returns the states of the generators that a model draws from, to be compared."""
    cuda = torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), cuda]
