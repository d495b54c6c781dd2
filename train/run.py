"""fit(): from a config and its columns to a run. What a user can get wrong is found before a model is built."""

import os
from pathlib import Path
from typing import Any

from configs import ConfigError
from shards import Order, Sources, open_sources
from shards.stream import Stream

from . import checkpoint
from .config import DataShape, TrainConfig
from .engine import deepspeed_config
from .loop import CHECKPOINTS, Batches, Trainer
from .model import DiT, DiTConfig
from .validate import Validator, open_held_out
from .world import World, join_world, leave_world


def fit(config: TrainConfig, run: Path, batches: Batches | None = None) -> int:
    """Train until `config.steps`, from the newest whole checkpoint of `run` if there is one; returns the exit code.

    `batches` may come from elsewhere than the columns, in the order that `Order` gives. All that a user can get wrong
    is found before the processes meet and the model is built."""
    sources = open_columns(config, checkpoint.pins(run / CHECKPOINTS))
    order = sources.order(config.seed, config.data.lanes, config.data.window)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    order.check(0, config.global_batch, size)
    deepspeed_config(config, size)
    model = model_config(config, shape_of(sources))
    held_out = open_held_out(config, sources)
    world = join_world()
    try:
        seen = world.gather(sources.identity())
        if seen[world.rank] != seen[0]:  # this rank looked at a growing column a little later
            sources = open_columns(config, seen[0])
            order = sources.order(config.seed, config.data.lanes, config.data.window)
        trainer = Trainer(config, run, sources, order, DiT(model, config.seed), world)
        validator = Validator(config, held_out, world) if held_out else None
        return trainer.run_to_end(batches or _from_columns(config, sources, order), validator)
    finally:
        leave_world()


def open_columns(config: TrainConfig, pins: dict[str, Any] | None) -> Sources:
    """The columns of a run, at the generations that `pins` (what `Sources.identity` said) names."""
    c = config.data.resolved()
    return open_sources(
        c.latents, c.text, c.also, c.truncated, weights=c.weights, bad=c.bad, partial=c.partial, pins=pins,
    )  # fmt: skip


def shape_of(sources: Sources) -> DataShape:
    return DataShape(*sources.latent_shape, sources.text_width)


def model_config(config: TrainConfig, shape: DataShape) -> DiTConfig:
    """The model that fits columns of this shape; ConfigError if none does, or if others were expected."""
    config.data.check(shape)
    c, size = config.model, (shape.height, shape.width)
    tokens = [side // c.patch_size for side in size]
    if any(side % c.patch_size for side in size) or (
        c.pos_embed == "ape" and max(tokens) > c.pos_embed_max_size
    ):
        raise ConfigError(
            f"{config.data.first[0]} holds latents of {size[0]} x {size[1]}, which patches of {c.patch_size} and "
            f"at most {c.pos_embed_max_size} tokens a side do not cover: change model.patch_size or "
            "model.pos_embed_max_size"
        )
    return DiTConfig(
        **c.model_dump(),
        in_channels=shape.channels,
        out_channels=shape.channels,
        text_width=shape.text_width,
    )


def _from_columns(config: TrainConfig, sources: Sources, order: Order) -> Batches:
    c = config.data

    def batches(position: int, world: World) -> Stream:
        return Stream(
            sources, order, position=position, global_batch=config.global_batch, world=world.size, rank=world.rank,
            prefetch=c.prefetch, ahead=c.ahead, workers=c.workers, pin=world.device.type == "cuda",
        )  # fmt: skip

    return batches
