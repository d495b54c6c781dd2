"""What a model sees of a latent: how many tokens, how many values each has, and where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .config import DiTConfig


def patch_of(height: int, width: int, tokens: int) -> int:
    """Returns the largest patch that divides both sides of a latent and leaves at least so many
    tokens; 1 where none leaves as many."""
    return next((p for p in patches(height, width) if height * width // p**2 >= tokens), 1)


def patches(height: int, width: int) -> Iterator[int]:
    """Yields the patches that divide both sides, the largest first."""
    return (p for p in range(min(height, width), 0, -1) if height % p == width % p == 0)


@dataclass(frozen=True)
class Tokens:
    """The image tokens of a model."""

    rows: int
    columns: int
    values: int  # of each
    patch: int
    positions: str  # for people

    @classmethod
    def of(cls, model: DiTConfig, height: int, width: int) -> Tokens:
        """Returns the tokens of latents of that height and width."""
        patch = model.patch_size
        rows, columns = height // patch, width // patch
        return cls(
            rows, columns, model.in_channels * patch**2, patch, _positions(model, rows, columns)
        )

    @property
    def count(self) -> int:
        return self.rows * self.columns

    @property
    def text(self) -> str:
        return (
            f"{self.count:,} of {self.values:,} values ({self.rows} x {self.columns}, patches of {self.patch}), "
            f"positions {self.positions}"
        )


def coordinates(model: DiTConfig, tokens: int) -> tuple[float, float]:
    """Returns the first and the last coordinate of so many tokens in a row of the table of sines:
    those of its middle."""
    side = model.pos_embed_max_size
    spacing = (model.sample_size // model.patch_size) / side
    first = (side - tokens) // 2
    return first * spacing, (first + tokens - 1) * spacing


def _positions(model: DiTConfig, rows: int, columns: int) -> str:
    if model.pos_embed != "ape":
        return model.pos_embed
    spans = {n: "{:.4g} to {:.4g}".format(*coordinates(model, n)) for n in (rows, columns)}
    return f"ape, {' and '.join(spans.values())}"
