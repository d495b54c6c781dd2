"""What caching saves on paper: the FLOPs of a step that runs the encoders, over those of a step
that reads columns.

The reference runs a VAE's encoder and Gemma-2B in each step. Their FLOPs were counted with torch's
FlopCounterMode on meta tensors of the real classes of diffusers and transformers; that of Gemma is
a formula that agrees with the counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.flops import Cost

# GFLOP to encode one picture, by its side in pixels
VAES = {
    "FLUX, SD-3.5": {256: 272.9, 512: 1117.6, 1024: 4882.6},
    "Qwen-Image": {256: 437.9, 512: 1770.8, 1024: 7392.5},
}
PADDED = 256  # tokens that the reference pads a caption to


def gemma(tokens: float) -> float:
    """Returns the FLOPs of Gemma-2B on a caption: 18 layers of width 2048, and attention."""
    matrices = 18 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 16384)
    return 2 * matrices * tokens + 4 * 18 * 2048 * tokens**2


@dataclass(frozen=True)
class Efficiency:
    """Share of a GPU's peak that each reaches. Assumed, but the trainer's is measured as MFU."""

    dit: float = 0.40
    llm: float = 0.45
    vae: float = 0.25


@dataclass(frozen=True)
class Saving:
    vae: str
    tokens: float  # a caption, as the encoder in the step sees it
    share: float  # of the FLOPs of an online step that the encoders take
    by_flops: float  # online over cached, if each FLOP took as long
    by_time: float  # with the assumed efficiencies


def savings(train: Cost, side: int, tokens: float, assumed: Efficiency) -> list[Saving]:
    """Returns the saving for each VAE at that side of the picture in pixels, of captions padded and
    at their own length; [] for a side not counted.

    The DiT takes the same text in both steps, so that nothing but the encoders differs."""
    rows = []
    for vae, by_side in VAES.items():
        for length in (PADDED, tokens):
            if side not in by_side:
                continue
            encode, read, dit = by_side[side] * 1e9, gemma(length), train.of(1, length)
            by_time = 1 + (encode / assumed.vae + read / assumed.llm) * assumed.dit / dit
            by_flops = 1 + (encode + read) / dit
            rows.append(Saving(vae, length, 1 - 1 / by_flops, by_flops, by_time))
    return rows
