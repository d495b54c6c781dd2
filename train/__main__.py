"""Train a diffusion transformer from a latent column and a text column.

    python -m train configs/train/cpu.yaml                                              # a CPU, after `make demo`
    torchrun --standalone --nproc-per-node 8 \\
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT \\
        -m train configs/train/flux-256.yaml                                            # a node
    python -m train init --latents COLUMN --text COLUMN --out mine.yaml                 # a config for your own columns
    python -m train plan configs/train/flux-256.yaml --gpu h100 --gpus 32               # before it starts
    python -m train page runs/flux-256                                                  # its curves, at any time
    python -m train saved configs/train/flux-256.yaml                                   # its newest checkpoint
    python -m train import REFERENCE_RUN runs/imported --tag 100000     # a checkpoint of the reference
    python -m train export runs/NAME/checkpoints/step-00100000 OUT --layout safetensors
    python -m train bench

Run it again to go on from the last checkpoint. Another VAE is another `data.latents`, and nothing else.
Exit codes: 0 done; 2 something to put right, said on stderr; 3 a loss or gradient was not finite; 4 a rank died or
stood still, which the others name; 5 another job trains in the same folder, or took it over; 128 + n after signal n
(TERM, INT, HUP, USR1, USR2, XCPU, QUIT), with a checkpoint of the step in progress. All ranks leave with the same one
(torchrun leaves with a code of its own, and gives its ranks 30 seconds).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from typing import Any

import configs
from configs import ConfigError
from shards import exits
from shards.console import Parser, bench_module, overview
from shards.launch import launched, take_local_rank
from shards.places import local_path
from shards.printing import Lines, command
from shards.signals import leave

VERBS = {  # what is not a run: a module with add_VERB_options or add_options, and run_VERB; a sentence
    "init": ("starter", "a commented config for columns of your own"),
    "config": ("starter", "a config with every key, or the JSON schema for editors"),
    "plan": ("plan.plan", "FLOPs, memory, hours and money of a config, before starting"),
    "page": ("report.page", "the curves of a run as an HTML page, at any time"),
    "saved": ("checkpoints.commands", "the newest checkpoint of a run"),
    "import": ("checkpoints.commands", "a checkpoint of the reference's trainer"),
    "export": (
        "checkpoints.commands",
        "a checkpoint's weights, for the reference's trainer or other programs",
    ),
    "bench": ("", "measure what the trainer costs beside a bare loop"),  # of tests/bench
}
TEXTS = {"CONFIG": "train, or go on from the last checkpoint"} | {
    v: t for v, (_, t) in VERBS.items()
}
EXAMPLES = (
    "python -m train configs/train/cpu.yaml",
    "python -m train init --latents columns/NAME/flux --text columns/NAME/gemma-2b",
    "python -m train plan configs:train/flux-256 --gpu h100 --gpus 32",
)


@command
def main() -> int:
    words = sys.argv[1:]
    take_local_rank(words)
    if not words:
        purpose = "a diffusion transformer from columns"
        print(overview("python -m train", purpose, TEXTS, EXAMPLES))
        return 0
    if words[0] in VERBS:
        parser, module = verb_parser(words[0])
        args = parser.parse_intermixed_args(words[1:])
        return int(getattr(module, f"run_{words[0]}")(args))
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if "=" in words[0] or words[0].startswith("-"):
        raise ConfigError(f"expected a config file as the first word\n{__doc__}")
    from .config import TrainConfig, run_folder
    from .report.loggers import check

    path = local_path(words[0])
    if not path.exists() and (near := configs.did_you_mean(words[0], VERBS, end="")):
        raise ConfigError(f"found {words[0]!r}, which is no verb and no config file{near}")
    config = configs.load(TrainConfig, path, words[1:])
    check(config.metrics)
    leader = launched(meet=True)[0] == 0
    level = logging.INFO if leader else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[Lines()])
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger(__package__).setLevel(level)
    from .run import fit  # torch and the columns' readers are loaded once the config is right

    return leave(fit(config, run_folder(config, path)))


def verb_parser(verb: str) -> tuple[argparse.ArgumentParser, Any]:
    """Returns the parser of a verb, and its module, which is loaded now."""
    parser = Parser(prog=f"python -m train {verb}", description=VERBS[verb][1])
    return parser, add_options(verb, parser)


def add_options(verb: str, parser: argparse.ArgumentParser) -> Any:
    """Adds the options of a verb, and returns its module, which is loaded now."""
    path = VERBS[verb][0]
    module = importlib.import_module(f".{path}", __package__) if path else bench_module("training")
    (getattr(module, f"add_{verb}_options", None) or module.add_options)(parser)
    return module


if __name__ == "__main__":
    exits.run(main)
