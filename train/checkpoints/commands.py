"""`python -m train saved`, `import` and `export`: the newest checkpoint of a run, checkpoints from
the reference, and for others.
"""

from __future__ import annotations

import argparse
import logging

import configs
from shards.console import config_words, not_negative, number
from shards.places import local_path, place

from ..config import LONGEST_EMA, SHORTEST_EMA, TrainConfig, run_folder
from .folders import steps

LAYOUTS = ("reference", "safetensors")
OLD_LAYOUTS = {"diffusers": "safetensors"}  # by releases before; diffusers itself has no such class
SETS = {  # of weights, by whether they are the averaged ones
    True: "the averaged weights (EMA; --weights exports the others)",
    False: "the weights that are not averaged (the average without --weights)",
}
EXPORT_LACKS = {  # what an export of each layout holds and leaves out
    "reference": "weights and average under the reference's names, without the optimizer's state and the place in the "
    "order of samples: the reference's trainer starts from them, and does not go on",
    "safetensors": "{weights} in diffusion_pytorch_model.safetensors and the model's sizes in config.json, as "
    "diffusers lays a model out; the class is train.model.DiT, which diffusers does not have. Optimizer, the other "
    "weights, shift and scale of the latents, the flow, VAE and text encoder are left out",
}
log = logging.getLogger(__name__)


def add_import_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=local_path, help="of the reference's run, with its config.json")
    add("out", type=local_path, help="where step-<tag> is written")
    add("--tag", type=not_negative, help="which of its checkpoints (default: the last)")
    add("--latents", metavar="COLUMN", type=place, help="of its VAE, to make pictures with it")
    add("--text", metavar="COLUMN", type=place, help="of its text encoder, the same")


def run_import(args: argparse.Namespace) -> int:
    from .reference import import_reference

    if (args.latents is None) != (args.text is None):
        given, other = ("--latents", "--text") if args.text is None else ("--text", "--latents")
        raise configs.ConfigError(
            f"{given}: found it without {other}, expected both columns, which pictures take, or neither. Name the "
            "other one too, or leave it out"
        )
    print(import_reference(args.folder, args.tag, args.out, args.latents, args.text))
    return 0


def add_export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("step", type=local_path, help="a step folder of a run's checkpoints")
    add("out", type=local_path, help="a new folder")
    add("--layout", type=_layout, choices=LAYOUTS, default=LAYOUTS[0],
        help="reference: for the reference's trainer (default); safetensors: weights alone, for a "
        "program of your own. `diffusers` is the old name of that one")  # fmt: skip
    add("--weights", action="store_true", help="of safetensors: weights that are not averaged")
    add("--ema", type=number(SHORTEST_EMA, LONGEST_EMA), metavar="LENGTH",
        help="of safetensors: an average of another length, of a run with ema.power")  # fmt: skip


def run_export(args: argparse.Namespace) -> int:
    from .reference import export

    flag = "--weights" if args.weights else None if args.ema is None else "--ema"
    if flag and args.layout != "safetensors":
        raise configs.ConfigError(
            f"{flag}: found --layout {args.layout}, which holds both sets of weights, expected "
            "safetensors. Leave one of the two flags out, or change the layout"
        )
    if args.weights and args.ema is not None:
        raise configs.ConfigError(
            f"--ema: found {args.ema:g} beside --weights, expected one of the two: an average, or the weights without"
        )
    ema = not args.weights if args.ema is None else args.ema
    weights = SETS[ema] if isinstance(ema, bool) else f"an average of length {ema:g} (EMA)"
    print(export(args.step, args.out, layout=args.layout, ema=ema))
    print(f"It holds {EXPORT_LACKS[args.layout].format(weights=weights)}.")
    return 0


def _layout(name: str) -> str:
    """Returns a layout by its name, or by one of a release before, which is said."""
    if name in OLD_LAYOUTS:
        log.warning(
            "--layout %s is called %s now: diffusers has no such class", name, OLD_LAYOUTS[name]
        )
    return OLD_LAYOUTS.get(name, name)


def add_saved_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the newest checkpoint of a run and when it was written, in seconds since 1970, or "
        "`none`. slurm.sbatch compares what it prints before and after a run."
    )
    config_words(parser)


def run_saved(args: argparse.Namespace) -> int:
    """Prints a line that is another one after each save; the files are not looked into."""
    run = run_folder(configs.load(TrainConfig, args.config, args.overrides), args.config)
    manifests = [step / "manifest.json" for step in steps(run / "checkpoints")]
    newest = next((manifest for manifest in manifests if manifest.is_file()), None)
    if newest:
        print(f"{newest.parent} {newest.stat().st_mtime_ns / 1e9:.3f}")
    else:
        print("none")
    return 0
