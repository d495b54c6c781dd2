"""`python -m train init`: a config for columns of one's own, with what they say. `python -m train
config`: what a config says in full.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import configs
from configs import ConfigError, add_config_options, read_yaml, show_config, word, write_new
from shards.console import counted
from shards.format.atomic import put_if_absent
from shards.places import local_path, place
from shards.printing import one_line

if TYPE_CHECKING:
    from shards import Column, JoinedColumns

    from .config import TrainConfig

__all__ = ["add_config_options", "add_init_options", "run_config", "run_init"]

LEAST_PLACES = 16  # a side of the latents from which a token is 2 x 2 of their places
ROWS_A_LANE = 16  # at least, so that few rows sit out in an epoch
LANES = 64
MODEL = ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "mlp_size")
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT"


@dataclass(frozen=True)
class Size:
    """A model and a training that suits it. The large models are those of shipped configs."""

    purpose: str
    model: dict[str, int] | str  # a shipped config's
    steps: int
    global_batch: int
    micro_batch: int
    optim: str
    decay: float
    every: int  # steps from one checkpoint to the next
    gpu: bool = True
    compiled: bool = False

    def shape(self) -> dict[str, int]:
        """Returns the keys of `model`."""
        if not isinstance(self.model, str):
            return self.model
        values = read_yaml(configs.shipped(self.model))["model"]
        return {key: values[key] for key in MODEL}


HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
SIZES = {
    "tiny": Size(
        "minutes on a CPU",
        {"hidden_size": 128, "layers": 4, **HEADS, "mlp_size": 384},
        *(1000, 32, 32, "{ lr: 1.5e-3, schedule: cosine, warmup: 50 }", 0.99, 250),
        gpu=False,
    ),
    "small": Size(
        "hours on one GPU",
        {"hidden_size": 384, "layers": 12, "heads": 6, "kv_heads": 2, "head_dim": 64, "mlp_size": 1024},
        *(100_000, 256, 64, "{ lr: 2e-4, warmup: 1000 }", 0.9999, 2000),
    ),
    "700m": Size(
        "one GPU of 80 GB, or several",
        "configs:train/dit700m_256",
        *(400_000, 256, 64, "{ lr: 1e-4, weight_decay: 1e-4 }", 0.9999, 2000),
        compiled=True,
    ),
    "1b": Size(
        "a node of GPUs",
        "configs:train/dit1b_256",
        *(500_000, 1024, 32, "{ lr: 1e-4, weight_decay: 1e-4 }", 0.9999, 5000),
        compiled=True,
    ),
    "3b": Size(
        "several nodes, as the reference",
        "configs:train/dit3b_256",
        *(500_000, 1024, 32, "{ lr: 1e-4, weight_decay: 1e-4 }", 0.9999, 5000),
        compiled=True,
    ),
}  # fmt: skip


def add_init_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Write a commented config for columns of your own. Channels, sizes and positions follow from "
        "the columns; batch and lanes from how many rows they have."
    )
    add("--latents", metavar="COLUMN", type=place, required=True, help="a column by a VAE")
    add("--text", metavar="COLUMN", type=place, required=True, help="a column of its captions")
    purposes = ", ".join(f"{name}: {size.purpose}" for name, size in SIZES.items())
    add("--size", choices=SIZES, default="small", help=f"{purposes} (default: small)")
    held_out = (
        "folder of a source whose columns have the same names, for validation (default: none)"
    )
    add("--held-out", metavar="SOURCE", type=place, help=held_out)
    out = "the new file (default: train.yaml); it names the run, too"
    add("--out", metavar="FILE", type=local_path, default=Path("train.yaml"), help=out)


def run_init(args: argparse.Namespace) -> int:
    """Writes the config once it has been loaded and fits the columns, and says how to go on."""
    configs.refuse_existing(args.out)  # before anything is opened
    from shards import open_sources

    sources = open_sources(args.latents, args.text)
    try:
        rows = len(sources.valid_rows)
        if not rows:
            raise ConfigError(
                f"{args.latents} and {args.text}: found no row that is valid in both, expected some to "
                "train on. `python -m shards info COLUMN` says why rows are not"
            )
        size = _fitted(SIZES[args.size], rows)
        text = _config_text(args, size, sources, rows)
        config = _checked(text, str(args.out), sources)
    finally:
        sources.close()
    write_new(args.out, text, put_if_absent)
    epochs = config.steps * config.global_batch / rows
    print(
        f"wrote {args.out}: {counted(config.steps, 'step')} of {counted(config.global_batch, 'sample')}, "
        f"{counted(round(epochs), 'epoch')} of {counted(rows, 'row')}"
    )
    print(f"next: {_start(args.out, sources)}")
    return 0


def run_config(args: argparse.Namespace) -> int:
    from .config import TrainConfig

    return show_config(TrainConfig, args)


def _fitted(size: Size, rows: int) -> Size:
    """Returns the size with batches of at most as many samples as there are rows."""
    batch = min(size.global_batch, _power_of_two(rows))
    return replace(size, global_batch=batch, micro_batch=min(size.micro_batch, batch))


def _power_of_two(number: int) -> int:
    """Returns the largest power of two up to a number of at least 1."""
    return 1 << (number.bit_length() - 1)


def _checked(text: str, out: str, sources: JoinedColumns) -> TrainConfig:
    """Returns the config that a text says; ConfigError where the trainer would refuse it."""
    from .config import TrainConfig
    from .run import model_config, order_of, refuse_narrow, shape_of
    from .step.engine import deepspeed_config
    from .step.validate import open_held_out

    config = configs.load_text(TrainConfig, text, out)
    if not sources.ids:
        refuse_narrow(model_config(config, shape_of(sources)), config.flow)
    order_of(config, sources).check(0, config.global_batch, 1)
    deepspeed_config(config, 1)
    if held_out := open_held_out(config, sources):
        held_out.close()
    return config


# The text ----------------------------------------------------------------------------------------


def _config_text(args: argparse.Namespace, size: Size, sources: JoinedColumns, rows: int) -> str:
    channels, height, width = sources.latent_shape
    hidden_size = size.shape()["hidden_size"]
    large = min(height, width) >= LEAST_PLACES and not (height % 2 or width % 2)
    patch = 2 if large and 4 * channels <= hidden_size else 1
    tokens = f"{height // patch} x {width // patch}"
    model = "\n".join(f"  {key}: {value}" for key, value in size.shape().items())
    lanes = min(LANES, _power_of_two(max(1, rows // ROWS_A_LANE)))
    epoch = rows / size.global_batch
    drawn = "drawn from moments" if sources.posterior else "as they are"
    held_out = (
        f"{{ source: {word(args.held_out)}, every: {size.every // 2} }} # each so many steps"
        if args.held_out
        else "null # { source: FOLDER } of a held-out source whose columns have the same names"
    )
    lines = f"""\
# A training on columns of one's own, by `python -m train init`. It starts as it is:
#
#   {_start(args.out, sources)}
#
# and the same command goes on after any interruption. On 8 GPUs of one machine:
#
#   torchrun --standalone --nproc-per-node 8 --signals-to-handle {SIGNALS} \\
#     -m {_start(args.out, sources).partition("-m ")[2]}
#
# Latents: {channels} x {height} x {width}, {drawn}, by {_encoder(sources.latents)}
# Text: {_text_line(sources)}
# Rows that are valid in both: {rows:,}
#
# The model's channels, text width and positions follow from these columns. Every key with its meaning: docs/config.md;
# all that this file leaves out: `python -m train config FILE`. A key on the command line: optim.lr=1e-4.
data:
  latents: {word(args.latents)} # another VAE is another column here, and nothing else
  text: {word(args.text)}
  lanes: {lanes} # strands of the order of samples, of which global_batch is a multiple
model: # {args.size}: {size.purpose}
{model}
  patch_size: {patch} # of latents of {height} x {width}: {tokens} tokens a picture; auto: follows the latents
steps: {size.steps} # {size.steps / epoch:,.1f} epochs; an epoch is {epoch:,.1f} steps
global_batch: {size.global_batch} # samples a step, of all GPUs together
micro_batch: {size.micro_batch} # samples at a time on one GPU: halve it where memory is short
optim: {size.optim}
ema: {{ decay: {size.decay} }} # of the averaged weights, by which pictures are made
validation: {held_out}
log_every: {max(1, min(100, size.every // 25))} # steps
save_every: {size.every}
keep: 3 # checkpoints; `save_at: [1000]` keeps more
"""
    if channels * patch**2 > hidden_size:
        values = channels * patch**2
        lines += f"flow: {{ prediction: latent }} # a token has {values} values, more than the model is wide\n"
    if size.gpu:
        lines += "deepspeed: configs:deepspeed/zero2.json # shipped: ZeRO 2, bfloat16 autocast\n"
    if size.compiled:
        lines += (
            "compute: { compile: true } # needs a C compiler; a quarter more samples a second\n"
        )
    return lines


def _start(out: Path, sources: JoinedColumns) -> str:
    """Returns the command that trains; where captions are ids it brings their encoder."""
    return f"python -m {'eval train' if sources.ids else 'train'} {one_line(shlex.quote(str(out)))}"


def _text_line(sources: JoinedColumns) -> str:
    by = _encoder(sources.text)
    most = f"at most {sources.max_tokens} tokens a caption"
    if sources.ids:
        return f"token ids, {most}, for {by}, which runs in the step"
    return f"tokens of {sources.text_width} numbers, {most}, by {by}"


def _encoder(column: Column) -> str:
    """Returns a column's encoder for people, in one line."""
    encoder: Any = column.spec.identity.get("encoder")
    if not isinstance(encoder, dict):
        return one_line(str(encoder))
    parts = [encoder.get(key) for key in ("class", "path", "subfolder")]
    return one_line(" ".join(map(str, filter(None, parts))))
