"""Train a diffusion transformer from a latent column and a text column.

    python -m train configs/train/cpu.yaml                                              # a CPU, after `make demo`
    torchrun --standalone --nproc-per-node 8 \\
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT \\
        -m train configs/train/flux-256.yaml                                            # a node
    python -m train plan configs/train/flux-256.yaml --gpu h100 --gpus 32               # before it starts
    python -m train page runs/flux-256                                                  # its curves, at any time
    python -m train saved configs/train/flux-256.yaml                                   # its newest checkpoint
    python -m train import REFERENCE_RUN runs/imported --tag 100000     # a checkpoint of the reference
    python -m train export runs/NAME/checkpoints/step-00100000 OUT --layout diffusers
    python -m train bench

Run it again to go on from the last checkpoint. Another VAE is another `data.latents`, and nothing else.
Exit codes: 0 done; 2 something to put right, said on stderr; 3 a loss or gradient was not finite; 4 a rank died or
stood still, which the others name; 5 another job trains in the same folder, or took it over; 128 + n after signal n
(TERM, INT, HUP, USR1, USR2, XCPU, QUIT), with a checkpoint of the step in progress. All ranks leave with the same one
(torchrun leaves with a code of its own, and gives its ranks 30 seconds).
"""

import argparse
import importlib
import logging
import os
import sys

import configs
from configs import ConfigError
from shards.console import bench_module
from shards.places import local_path
from shards.printing import safe_output
from shards.signals import leave

from .config import TrainConfig, run_folder
from .report.loggers import check

COMMANDS = {  # what is not a run: module, function that adds the options, function that takes them
    "plan": ("plan.plan", "add_options", "run_plan"),
    "page": ("report.page", "add_options", "run_page"),
    "saved": ("checkpoints.commands", "add_saved_options", "run_saved"),
    "bench": ("", "add_options", "run_bench"),  # of tests/bench
    "import": ("checkpoints.commands", "add_import_options", "run_import"),
    "export": ("checkpoints.commands", "add_export_options", "run_export"),
}


def main() -> int:
    safe_output()
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return _command(sys.argv[1], sys.argv[2:])
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    if len(sys.argv) < 2 or "=" in sys.argv[1] or sys.argv[1].startswith("-"):
        raise ConfigError(f"expected a config file as the first word\n{__doc__}")
    path = local_path(sys.argv[1])
    config = configs.load(TrainConfig, path, sys.argv[2:])
    check(config.metrics)
    leader = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if leader else logging.WARNING, format="%(message)s", stream=sys.stdout
    )
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO if leader else logging.WARNING)
    from .run import fit  # torch and the columns' readers are loaded once the config is right

    return leave(fit(config, run_folder(config, path)))


def _command(name: str, words: list[str]) -> int:
    """Load its module, and no other, and run it."""
    module, add_options, run = COMMANDS[name]
    found = (
        importlib.import_module(f".{module}", __package__) if module else bench_module("training")
    )
    parser = argparse.ArgumentParser(prog=f"python -m train {name}")
    getattr(found, add_options)(parser)
    return int(getattr(found, run)(parser.parse_intermixed_args(words)))


if __name__ == "__main__":
    configs.run(main)
