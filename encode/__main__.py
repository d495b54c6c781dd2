"""Encode tars into columns.

    python -m encode init --sources TARS --vae flux --text gemma-2b    # a config for your own
    python -m encode plan CONFIG                   # bytes, hours and money, before starting
    python -m encode check CONFIG                  # the autoencoders, a class of your own too
    python -m encode run configs/demo/encode.yaml
    python -m encode run CONFIG root=/data/cache engine.workers=8
    python -m encode status CONFIG --watch
    python -m encode retry-failed CONFIG           # only shards that have failed
    python -m encode download DATASET FOLDER
    python -m encode pack SOURCE FOLDER            # pictures and captions of your own into tars
    python -m encode bench
    ray job submit --working-dir . -- python -m encode run CONFIG

A second run does nothing; an interrupted one goes on where it stopped. Exit codes: 0 done, 2
config, identity or disk, 3 finished but some shards failed, a column has no usable row, most of its
rows lack the picture or caption that it reads, or objects that are committed are missing
(`report.json` and the output say which), 4 no workers left, 5 a column is held by another command,
128 + n stopped by signal n (SIGTERM: 143, SIGINT: 130).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import configs
from shards import exits
from shards.console import Parser, bench_module, config_words, overview
from shards.printing import command
from shards.signals import leave

VERBS = {  # module with add_VERB_options or add_options, and run_VERB; a sentence
    "init": ("starter", "a commented config for sources and models of your own"),
    "config": ("starter", "a config with every key, or the JSON schema for editors"),
    "plan": ("plan.plan", "bytes, hours and money of a config, before starting"),
    "check": ("models.check", "whether the autoencoders of a config do what columns need of them"),
    "run": ("", "encode what is missing; an interrupted run goes on where it stopped"),
    "status": ("report.status", "how far the columns are, and what a run waits for"),
    "retry-failed": ("", "encode what has failed before, and nothing else"),
    "download": ("source.download", "bring a data set here"),
    "pack": ("pack.pack", "a folder, table or Parquet of your own into tars"),
    "bench": ("", "measure the engine's own cost"),  # of tests/bench
}
RUNS = ("run", "retry-failed")
EXAMPLES = (
    "python -m encode pack pictures tars",
    "python -m encode init --sources tars --vae flux --text gemma-2b",
    "python -m encode run encode.yaml",
)


@command
def main() -> int:
    name = (sys.argv[1:] or [""])[0]
    if not name:
        texts = {verb: text for verb, (_, text) in VERBS.items()}
        print(overview("python -m encode", "images and captions into columns", texts, EXAMPLES))
        return 0
    parser = Parser(prog="python -m encode", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verbs = {
        v: commands.add_parser(v, help=text, description=text) for v, (_, text) in VERBS.items()
    }
    if name in verbs:  # the others are not loaded
        add_options(name, verbs[name])
    args = _parsed(parser)
    if name not in RUNS:
        return int(getattr(_module(name), f"run_{name}")(args))
    from .config import EncodeConfig
    from .run.job import Options, run

    config = configs.load(EncodeConfig, args.config, args.overrides)
    if args.allow_failed:
        config = config.model_copy(update={"allow_failed": True})
    options = Options(name == "retry-failed", args.ignore_space, args.break_lease)
    return leave(run(config, options))


def _module(verb: str) -> Any:
    path = VERBS[verb][0]
    return importlib.import_module(f".{path}", __package__) if path else bench_module("encoding")


def add_options(verb: str, parser: argparse.ArgumentParser) -> None:
    """Adds the options of a verb, whose module is loaded now."""
    if verb not in RUNS:
        module = _module(verb)
        (getattr(module, f"add_{verb}_options", None) or module.add_options)(parser)
        return
    config_words(parser)
    for flag, text in (
        ("--allow-failed", "complete columns without the shards that failed"),
        ("--ignore-space", "start although the target seems to have too little room"),
        ("--break-lease", "take a column over from a command that is surely gone"),
    ):
        parser.add_argument(flag, action="store_true", help=text)


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Overrides may stand behind options, which argparse does not allow of a subcommand."""
    args, behind = parser.parse_known_args()
    if behind:
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in behind):
            parser.error(f"unrecognized arguments: {' '.join(behind)}")
        args.overrides += behind
    return args


if __name__ == "__main__":
    exits.run(main)
