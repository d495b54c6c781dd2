"""fit(): from a config and its columns to a run. What a user can get wrong is found before a model
is built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from configs import ConfigError, explained
from shards import IdentityMismatch, JoinedColumns, Order, Stream, open_sources
from shards.format import differences, preprocess_of
from shards.launch import launched
from shards.read import empty_caption

from .checkpoints import checkpoint, folders, init_weights
from .checkpoints.identity import precision
from .config import DataShape, TrainConfig
from .loop import CHECKPOINTS, Batches, Trainer
from .model.config import REFERENCE_PATCH, FlowConfig, ModelConfig, table_side
from .model.dit import DiT, DiTConfig
from .model.tokens import patch_of
from .ranks.world import World, joined
from .ready import check_compiler, check_room
from .step.engine import deepspeed_config
from .step.online_text import TextEncoder, identity_of
from .step.validate import Validator, open_held_out

log = logging.getLogger(__name__)


def fit(
    config: TrainConfig, run: Path, batches: Batches | None = None, text_encoder: TextEncoder | None = None
) -> int:  # fmt: skip
    """Trains until `config.steps`, from the newest whole checkpoint of `run` if there is one;
    returns the exit code.

    `batches` may come from elsewhere than the columns, in the order that `Order` gives; a signal to
    stop is then noticed when the next one comes. `text_encoder` makes tokens of ids where
    `data.text` is a column of ids. All that a user can get wrong is found before the processes meet
    and the model is built."""
    launched(meet=True)
    sources, order = open_run(config, run)
    check_text_encoder(sources, text_encoder)
    shape = shape_of(sources, text_encoder)
    config = with_sizes(config, shape, _recorded_model(config, run))
    model = model_config(config, shape)
    held_out = open_held_out(config, sources)
    fresh = not folders.steps(run / CHECKPOINTS)
    start = init_weights.find_initial(config, model) if fresh else None
    if fresh and (note := refuse_narrow(model, config.flow)):
        log.info("note: %s", note)
    check_compiler(config.compute, torch.cuda.is_available())
    check_room(config, model, run / CHECKPOINTS)
    with joined(config.guard, run) as world:
        identities = world.gather(sources.identity())
        if identities[world.rank] != identities[0]:  # it read a growing column a little later
            sources = open_columns(config, identities[0])
            order = order_of(config, sources)
        start = world.gather(start)[0]  # a run that goes on may have saved meanwhile
        net = DiT(model, config.seed)
        if start:
            start.load(net, world)
        trainer = Trainer(
            config, run, sources, order, net, world, text_encoder, start and start.record
        )
        validator = Validator(config, held_out, world, text_encoder) if held_out else None
        return trainer.run_to_end(batches or from_columns(config, sources, order), validator)


# Columns -------------------------------------------------------------------------------------------------------------


def open_run(config: TrainConfig, run: Path) -> tuple[JoinedColumns, Order]:
    """Returns the columns of a run and their order, at the snapshots that its checkpoints name; the
    batch fits both, and the number of processes."""
    sources = open_columns(config, checkpoint.pins(run / CHECKPOINTS))
    order = order_of(config, sources)
    size = launched()[1]
    order.check(0, config.global_batch, size)
    deepspeed_config(config, size)
    return sources, order


def open_columns(config: TrainConfig, pins: dict[str, Any] | None) -> JoinedColumns:
    """Returns the columns of a run, at the snapshots of `JoinedColumns.identity` in `pins`."""
    c = config.data.resolved()
    return open_sources(
        c.latents, c.text, c.also, c.truncated, weights=c.weights, bad=c.bad, partial=c.partial, pins=pins,
        masks=c.masks, norm=c.norm,
    )  # fmt: skip


def order_of(config: TrainConfig, sources: JoinedColumns) -> Order:
    return sources.order(config.seed, config.data.lanes, config.data.window)


def from_columns(
    config: TrainConfig,
    sources: JoinedColumns,
    order: Order,
    stream: Callable[..., Stream] = Stream,
) -> Batches:
    """Returns the batches of columns, by a stream of some class."""
    c = config.data

    def batches(position: int, world: World) -> Stream:
        return stream(
            sources, order, position=position, global_batch=config.global_batch, world=world.size, rank=world.rank,
            prefetch=c.prefetch, ahead=c.ahead, pin=world.device.type == "cuda",
        )  # fmt: skip

    return batches


def expected_record(config: TrainConfig, world: int = 1) -> dict[str, Any]:
    """Returns what a checkpoint of the last step will say of its training, of the columns as they
    are now; where the text is ids, without the model's width of text, and without the weights that
    it starts from, where these do not exist yet."""
    sources = open_columns(config, None)
    try:
        order = order_of(config, sources)
        order.check(0, config.global_batch, world)
        initial: Mapping[str, Any] = {}
        with suppress(checkpoint.CheckpointError):
            initial = initial_model(config)
        width = sources.text_width or initial.get("text_width", 1)
        shape = DataShape(*sources.latent_shape, width)
        model_to_be = model_config(with_sizes(config, shape, initial), shape)
        model = model_to_be.model_dump(mode="json")
        if sources.ids:
            del model["text_width"]
        init: dict[str, Any] = {}
        with suppress(checkpoint.CheckpointError):
            start = init_weights.find_initial(config, model_to_be)
            init = {"init": start and start.record}
        return init | {
            "step": config.steps,
            "position": config.steps * config.global_batch,
            "model": model,
            "latent_shape": list(sources.latent_shape),
            "config": config.model_dump(mode="json"),
            "data": sources.identity(),
            "order": order.identity(),
            "deepspeed": precision(deepspeed_config(config, world)),
        }
    finally:
        sources.close()


# What fits them ------------------------------------------------------------------------------------------------------


def check_text_encoder(sources: JoinedColumns, text_encoder: TextEncoder | None) -> None:
    """Raises ConfigError unless there is an encoder if, and only if, the text is ids, and
    IdentityMismatch unless it cuts captions as the column does."""
    column = sources.texts[0]
    if sources.ids and text_encoder is None:
        raise ConfigError(
            f"{column.path}: found a column of ids, on which a text encoder has to run in every step, and none was "
            "handed in. Start it as `torchrun -m eval train CONFIG`, which brings it, or give data.text a column of "
            "tokens"
        )
    if text_encoder is None:
        return
    if not sources.ids:
        raise ConfigError(
            f"{column.path}: found a column of {column.layout.kind}, and a text encoder that was handed in: it runs on "
            "a column of ids. Leave one of them out"
        )
    encoder = preprocess_of(identity_of(text_encoder) or {})
    expected = preprocess_of(column.spec.identity)
    if encoder is None or expected is None:
        return
    # ids have no hidden state, and captions differ
    keys = sorted({*encoder, *expected} - {"hidden_state", "caption"})
    lines = differences({k: encoder.get(k) for k in keys}, {k: expected.get(k) for k in keys})
    if lines:
        raise IdentityMismatch(
            "\n  ".join(
                [f"the text encoder is not that of {column.path} (found, expected):", *lines]
            )
            + "\nHand in the one whose tokenizer made the column"
        )


def shape_of(sources: JoinedColumns, text_encoder: TextEncoder | None = None) -> DataShape:
    """Returns the sizes that the model takes; of ids, by encoding the empty caption."""
    width = sources.text_width
    if width is None:
        assert text_encoder is not None
        ids = empty_caption(sources).to(_device())
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            tokens = text_encoder(ids, ends)
        if tokens.ndim != 2 or len(tokens) != len(ids):
            raise ConfigError(
                f"the text encoder made {tuple(tokens.shape)} of {len(ids)} ids, expected ({len(ids)}, width): a row "
                "for each id, packed as they are"
            )
        width = tokens.shape[1]
    return DataShape(*sources.latent_shape, width)


def _device() -> torch.device:
    """Returns the device of this process, before it has joined the others."""
    if torch.cuda.is_available():
        return torch.device("cuda", launched()[2])
    return torch.device("cpu")


def _recorded_model(config: TrainConfig, run: Path) -> Mapping[str, Any]:
    """Returns the model of the run that goes on, or of the weights that it starts from."""
    if not folders.steps(run / CHECKPOINTS):
        return initial_model(config)
    recorded = checkpoint.recorded(run / CHECKPOINTS, "model")
    return recorded if isinstance(recorded, Mapping) else {}


def initial_model(config: TrainConfig) -> Mapping[str, Any]:
    """Returns the model of the weights that a run starts from; CheckpointError where there are none."""
    if config.init_from is None:
        return {}
    model = init_weights.initial_step(config.init_from)[1].get("model")
    return model if isinstance(model, Mapping) else {}


def with_sizes(
    config: TrainConfig, shape: DataShape, recorded: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Returns the config with numbers for what follows the latent: the timestep shift, the patch, and
    the sizes of the table of positions, as the config names them, else as `recorded` does, else the
    latent's."""
    c, recorded, side = config.model, recorded or {}, max(shape.height, shape.width)
    patch, pos_embed, sample_size = _patch(c, shape, recorded), c.pos_embed, c.sample_size
    if c.patch_size == "auto":
        if sample_size is not None:  # as many tokens a side as the reference's patches make
            sample_size = sample_size // REFERENCE_PATCH * patch
        if shape.height == 1:  # tokens without a second dimension
            pos_embed = "1d-rope"
    sizes = {"pos_embed_max_size": table_side(max(1, side // patch)), "sample_size": side}
    sizes |= {key: value for key, value in recorded.items() if key in sizes}
    named = {"pos_embed_max_size": c.pos_embed_max_size, "sample_size": sample_size}
    sizes |= {key: value for key, value in named.items() if value is not None}
    model = c.model_copy(update={"patch_size": patch, "pos_embed": pos_embed, **sizes})
    flow = config.flow.resolved(shape.channels * shape.height * shape.width)
    return config.model_copy(update={"model": model, "flow": flow})


def _patch(model: ModelConfig, shape: DataShape, recorded: Mapping[str, Any]) -> int:
    if model.patch_size != "auto":
        return model.patch_size
    patch = recorded.get("patch_size")
    if isinstance(patch, int) and patch > 0:
        return patch
    return patch_of(shape.height, shape.width, model.image_tokens)


def model_config(config: TrainConfig, shape: DataShape) -> DiTConfig:
    """Returns the model that fits the data; ConfigError if none does."""
    config.data.check(shape)
    c = with_sizes(config, shape).model
    assert c.pos_embed_max_size is not None
    assert not isinstance(c.patch_size, str)
    sides = shape.height, shape.width
    tokens = [side // c.patch_size for side in sides]
    if any(side % c.patch_size for side in sides) or (
        c.pos_embed == "ape" and max(tokens) > c.pos_embed_max_size
    ):
        raise ConfigError(
            f"{config.data.first[0]} holds latents of {sides[0]} x {sides[1]}, which patches of {c.patch_size} and "
            f"at most {c.pos_embed_max_size} tokens a side do not cover: change model.patch_size or "
            "model.pos_embed_max_size"
        )
    values = c.model_dump(exclude={"image_tokens"}) | {
        "in_channels": shape.channels,
        "out_channels": shape.channels,
        "text_width": shape.text_width,
    }
    try:
        return DiTConfig(**values)
    except ValidationError as error:  # of what `auto` chose
        raise ConfigError(explained(DiTConfig, values, error, above="model")[0]) from None


def refuse_narrow(model: DiTConfig, flow: FlowConfig) -> str | None:
    """Raises ConfigError where a token has more values than a model of velocities is wide, whose loss
    then cannot fall to 0 (RAE, arXiv 2510.11690, theorem 1); returns a note where a model of latents
    is as narrow."""
    channels, patch, width = model.in_channels, model.patch_size, model.hidden_size
    values = channels * patch**2
    if values <= width:
        return None
    problem = f"found tokens of {channels} x {patch} x {patch} = {values:,} values and a model of width {width:,}"
    if flow.prediction == "latent":
        return f"{problem}: latents of so many values are estimated within {width:,} dimensions"
    fits = [p for p in range(patch - 1, 0, -1) if patch % p == 0 and channels * p**2 <= width]
    smaller = "" if not fits else f"model.patch_size={fits[0]}, "
    raise ConfigError(
        f"model: {problem}, expected at most as many values, since noise in each of them is part of a velocity. Say "
        f"{smaller}model.hidden_size={values} or more, or flow.prediction=latent"
    )
