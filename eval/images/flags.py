"""The flags of `python -m eval generate`, named as in the reference's scripts where it has them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shards.console import not_negative, number, positive
from shards.places import local_path, model
from train.config import LONGEST_EMA, SHORTEST_EMA
from train.model import LEAST_SHIFT, MOST_SHIFT

from ..errors import BadRequest
from ..prompts.benchmarks import BENCHMARKS

# Settings of which `eval generate` takes several values, one set of pictures each, and what reads a value:
# a flag and a field of Request have the same name. `eval sweep --over` takes them too.
AXES: dict[str, Callable[[str], float]] = {
    "ema": number(
        SHORTEST_EMA, LONGEST_EMA
    ),  # first, so that sets of the same weights follow one another
    "guidance_scale": number(),
    "shift": number(LEAST_SHIFT, MOST_SHIFT),
}
# fields of a request that decide where a set is and how is sampled: a generator serves any value of them
SAMPLED = {"guidance_scale", "shift", "save_dir"}


def device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one")


def class_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-class", nargs="+", metavar="MODULE:CLASS",
        help="Python classes of your own that may be imported where a column names them as its encoder",
    )  # fmt: skip


def sampling_flags(
    parser: argparse.ArgumentParser, batch_size: int | None = None, several: bool = False
) -> None:
    """Adds what decides pictures in `generate` and `watch`; `several`: AXES take several values."""
    flag = parser.add_argument
    device_flag(parser)
    flag("--benchmark", choices=BENCHMARKS, default="prompts", help="prompts: of your own")
    flag("--num_inference_steps", type=positive, default=25, help="of the sampler")
    flag(
        "--guidance_scale", type=AXES["guidance_scale"], default=6.0, nargs="+" if several else None,
        help="1 or below: the prompt alone is run" + ("; several: a set each" if several else ""),
    )  # fmt: skip
    text = "pictures at a time" + ("" if batch_size else " (default: the benchmark's)")
    flag("--batch_size", type=positive, default=batch_size, help=text)
    flag("--seed", type=not_negative, default=42, help="of the pictures' noise")
    average = "the averaged weights, or those of the step"
    flag("--ema_weights", action=argparse.BooleanOptionalAction, default=True, help=average)
    flag(
        "--ema", type=AXES["ema"], nargs="+" if several else None, metavar="LENGTH",
        help="average of another length, relative to the updates, of a run with ema.power"
        + ("; several: a set each" if several else ""),
    )  # fmt: skip
    moved = "where the columns' VAE lies now, if not where it was: a folder, or flux, sd35, ..."
    flag("--vae", type=model, help=moved)
    flag("--text-encoder", type=model, help="likewise for the text encoder")
    class_flag(parser)


def generate_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--checkpoint", type=local_path, required=True, help="a run, or one of its steps")
    flag("--save_dir", type=local_path, required=True, help="a new folder, or one to go on with")
    flag(
        "--half", choices=("a", "b"),
        help="one half of the prompts, as `eval sweep` divides them: to choose on it, and report on the other",
    )  # fmt: skip
    set_flags(parser, several=True)


def set_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds what decides a set of pictures, but for the run and the folder."""
    flag = parser.add_argument
    flag("--tag", type=not_negative, help="the step of the run; the last without")
    flag(
        "--type", choices=("latentbank", "baseline-dit"), default="latentbank",
        help="baseline-dit: a folder of the reference's, with config.json and TAG/mp_rank_00_model_states.pt",
    )  # fmt: skip
    flag(
        "--prompts", "--metadata_file", type=local_path,
        help="its prompt file, if not the one fetched; of your own: .txt, one a line; .json, list or {id: prompt}",
    )  # fmt: skip
    sampling_flags(parser, several=several)
    flag("--resolution", type=positive, help="pixels; the columns' by default, 256 without any")
    flag("--sampler", choices=("euler", "dpmpp-2m"), default="euler", help="of the ODE")
    flag(
        "--shift", type=AXES["shift"], nargs="+" if several else None,
        help="timestep shift of the sampler's noise levels; that of the run's training by default"
        + ("; several: a set each" if several else ""),
    )  # fmt: skip
    flag(
        "--guidance_interval", type=number(-math.inf), nargs=2, metavar=("LOW", "HIGH"),
        help="of sigma, 0 to 1: outside of it the prompt alone is run, at half the cost",
    )  # fmt: skip
    flag("--n_samples", "--num_samples", type=positive, help="pictures of a prompt; likewise")
    flag(
        "--allow-other-encoder", action="store_true",
        help="take what --vae and --text-encoder name, though the columns were made with others",
    )  # fmt: skip
    cache = "of encoded prompts, for several sets; SAVE_DIR/text by default"
    flag("--text_cache", type=local_path, help=cache)
    flag("--threads", type=positive, default=1, help="of a rank, on a CPU")


def interval_of(ends: Sequence[float] | None) -> tuple[float, float] | None:
    """Returns the interval of sigma in which guidance is used; BadRequest where it is none."""
    if ends is None:
        return None
    low, high = ends
    if not 0 <= low < high <= 1:
        raise BadRequest(
            f"--guidance_interval: found {low:g} {high:g}, expected 0 <= LOW < HIGH <= 1"
        )
    return low, high


def single(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with the one value of each of AXES; BadRequest where one has several."""
    values = {key: value for key, value in settings.items() if isinstance(value, list)}
    several = [name for name in AXES if len(values.get(name, ())) > 1]
    if several:
        raise BadRequest(
            f"--{several[0]}: found {len(values[several[0]])} values, expected one: choose it with "
            "`python -m eval sweep`"
        )
    return {**settings, **{name: values[name][0] for name in AXES if name in values}}


def plain(value: float) -> str:
    """Returns a number in full, without a point where it is whole: 2, 1.5."""
    return repr(float(value)).removesuffix(".0")
