"""`python -m train plan CONFIG --latents A B C`: what follows the latents of several columns in the
same config, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

import configs
from configs import ConfigError
from shards.console import render

from ..config import TrainConfig, column_name
from ..model.config import shift_of
from ..model.flops import in_tera, training
from ..model.tokens import Tokens
from ..run import model_config, refuse_narrow, with_sizes
from .survey import of_columns

WIDTH = 60  # characters of the table


@dataclass(frozen=True)
class LatentPlan:
    """What a config makes of the latents of a column."""

    latents: str
    shape: tuple[int, int, int]  # (C, H, W)
    tokens: Tokens
    shift: float
    flops: float  # a sample, forward and backward
    note: str | None  # of a model that is narrower than a token
    refused: bool  # whether it would not be trained
    follows: bool  # whether the patch is chosen for the latents

    @property
    def name(self) -> str:
        return column_name(self.latents)


def plan_latents(
    path: Path, overrides: Sequence[str], latents: str, tokens: float | None = None
) -> LatentPlan:
    """Returns what a config makes of a column in the place of its own, which `data.expect` does not
    describe; errors of columns that cannot be opened. `tokens` a caption: None takes the column's."""
    config = configs.load(TrainConfig, path, [*overrides, f"data.latents={configs.word(latents)}"])
    data = of_columns(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"expect": None})})
    shape, follows = data.shape, config.model.patch_size == "auto"
    config = with_sizes(config, shape)
    model = model_config(config, shape)
    try:
        note, refused = refuse_narrow(model, config.flow), False
    except ConfigError as error:
        note, refused = str(error), True
    size = shape.height, shape.width
    return LatentPlan(
        latents, (shape.channels, *size), Tokens.of(model, *size), config.flow.timestep_shift,
        training(model, *size).of(1, tokens or data.tokens), note, refused, follows,
    )  # fmt: skip


def as_text(plans: Sequence[LatentPlan]) -> str:
    """Returns the plans for a reader."""
    numbers = ("patch", "tokens", "values", "shift", "FLOPs")
    heads = [Column("latents", overflow="fold"), Column("C x H x W", no_wrap=True)]
    heads += [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(*heads, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for plan in plans:
        tokens = plan.tokens
        table.add_row(
            plan.name, "x".join(map(str, plan.shape)), str(tokens.patch), f"{tokens.count:,}",
            f"{tokens.values:,}", f"{plan.shift:.3g}", in_tera(plan.flops),
        )  # fmt: skip
    return render(
        table,
        "",
        "values of a token; FLOPs of a sample, forward and backward",
        *(Text(f"{plan.name}: positions {plan.tokens.positions}") for plan in plans),
        *(Text(f"{plan.name}: {plan.note}") for plan in plans if plan.note),
        *map(Text, unfair(plans)),
        width=WIDTH,
    )


def unfair(plans: Sequence[LatentPlan]) -> list[str]:
    """Returns what should follow the latents and does not."""
    lines = []
    own = {shift_of(prod(plan.shape)) for plan in plans}
    if len(own) > 1 and len({plan.shift for plan in plans}) == 1:
        lines.append(
            f"one shift, {plans[0].shift:.3g}, for latents of other dimensions: flow.shift=auto follows them"
        )
    counts = {plan.tokens.count for plan in plans}
    if len(counts) > 1 and not all(plan.follows for plan in plans):
        lines.append(
            f"one patch, {plans[0].tokens.patch}, and {' or '.join(f'{n:,}' for n in sorted(counts))} tokens: "
            "model.patch_size=auto makes them as many where it can"
        )
    return lines


def as_records(plans: Iterable[LatentPlan]) -> list[dict[str, object]]:
    """Returns the plans as JSON."""
    return [
        {
            "latents": plan.latents, "shape": list(plan.shape), "image_tokens": plan.tokens.count,
            **asdict(plan.tokens), "shift": plan.shift, "flops_a_sample": plan.flops, "note": plan.note,
            "refused": plan.refused,
        }
        for plan in plans
    ]  # fmt: skip
