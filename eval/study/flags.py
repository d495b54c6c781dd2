"""The flags of `eval generate` and of scorers that a study's YAML gives, parsed as those commands do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from configs import did_you_mean
from shards import console
from train.checkpoints.snapshots import EmaLengthRefused, refuse_planned

from ..errors import BadRequest, BadStudy
from ..images.flags import generate_flags, interval_of, single
from ..score import SCORERS, add_flags
from .config import ScorerConfig, flag_words
from .study import Study


class _Parser(console.Parser):
    """Raises BadStudy in place of leaving the program."""

    def error(self, message: str) -> NoReturn:
        raise BadStudy(f"{self.prog}: {message}")


def _parsed(
    name: str,
    command: str,
    words: tuple[str, ...],
    flags: Callable[[argparse.ArgumentParser], None],
) -> argparse.Namespace:
    parser = _Parser(prog=name, conflict_handler="resolve", add_help=False, allow_abbrev=False)
    flags(parser)
    args = argparse.Namespace()
    _, unknown = parser.parse_known_args(words, args)
    if unknown:
        flag = unknown[0].lstrip("-")
        known = [word.lstrip("-") for action in parser._actions for word in action.option_strings]
        raise BadStudy(
            f"{name}: found {flag}, expected flags of `{command}`{did_you_mean(flag, known)} "
            f"`python -m {command} --help` lists them"
        )
    return args


def generate_settings(study: Study) -> dict[str, Any]:
    """Returns what `eval generate` is called with, but for folders; BadStudy for a flag that it lacks."""
    words = ("--checkpoint", "RUN", "--save_dir", "DIR", *flag_words(study.config.generate))
    args = _parsed(f"{study.path}: generate", "eval generate", words, generate_flags)
    try:
        settings = single(vars(args))
    except BadRequest as error:
        raise BadStudy(f"{study.path}: generate: {error}") from None
    count = settings["n_samples"]
    if count is not None and count != study.images_per_prompt:  # in a list, or by both names
        raise BadStudy(
            f"{study.path}: generate: found {count} pictures of a prompt and {study.images_per_prompt}, expected one "
            f"number by one name. Write n_samples: {count}"
        )
    if settings["ema"] is not None:
        _check_average(study, "generate: ema", settings["ema"], settings["ema_weights"])
    for length in study.axes.get("ema", ()):
        _check_average(study, "settle.ema", length, settings["ema_weights"])
    return settings | {"guidance_interval": interval_of(args.guidance_interval)}


def _check_average(study: Study, key: str, length: float, averaged: bool) -> None:
    """Raises BadStudy where a run will not have kept what an average of a length takes at a step that is
    sampled.
    """
    title = f"{study.path}: {key}:"
    if not averaged:
        raise BadStudy(
            f"{title} found it beside ema_weights: false, expected one of the two: an average, or the weights without"
        )
    for entry in study.entries:
        config = study.train_config(entry, study.seeds[0])
        for step in study.steps:
            try:
                refuse_planned(config.ema, config.steps, step, length)
            except EmaLengthRefused as error:
                raise BadStudy(f"{title} {entry}: {error}") from None


def scorer_settings(study: Study, scorer: ScorerConfig) -> argparse.Namespace:
    """Returns what `eval score NAME` is called with, but for the sets; BadStudy for a scorer or a flag
    that does not exist.
    """
    if scorer.name not in SCORERS:
        raise BadStudy(
            f"{study.path}: scorers: found {scorer.name!r}, expected one of {', '.join(sorted(SCORERS))}"
            f"{did_you_mean(scorer.name, SCORERS, '')}"
        )
    name = f"{study.path}: scorers: {scorer.name}"
    args = _parsed(
        name,
        f"eval score {scorer.name}",
        scorer.words,
        lambda p: add_flags(p, SCORERS[scorer.name].flags),
    )
    args.partial = False
    return args
