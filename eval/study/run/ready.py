"""Whether the scorers of a study can score its prompts: their weights, flags and references, in a process of its
own, whose memory is free again before anything is trained.

    python -m eval.study.run.ready STUDY.yaml
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from shards import ShardsError, exits

from ...errors import BadPrompts, EvalError, TooFewImages
from ...prompts.prompts import Prompts
from ...score import SCORERS
from ..config import ScorerConfig
from ..flags import scorer_settings
from ..pictures import prompts_of
from ..study import Study


def main() -> None:
    """Loads each scorer's weights; its named error says what is missing, or which prompt it cannot score."""
    import torch

    study = Study.open(Path(sys.argv[1]))
    prompts = prompts_of(study)
    for config in study.scorers:
        args = _settings(study, config, "cuda" if torch.cuda.is_available() else "cpu")
        scorer = SCORERS[config.name]
        scorer.ready(args)
        scorer.suits(args, prompts)
        _check_counts(study, config, args, prompts)


def refuse_few(study: Study) -> None:
    """Raises TooFewImages where sets of a study, or halves of them, have too few pictures for a scorer. Nothing is
    said of prompts, weights and references that are not here, nor of models of the hub, which would be fetched.
    """
    try:
        prompts = prompts_of(study)
    except BadPrompts:
        return
    for config in study.scorers:
        args = _settings(study, config, "cpu")
        weights = getattr(args, "weights", None)
        if weights is None or Path(weights).is_dir():
            try:
                _check_counts(study, config, args, prompts)
            except TooFewImages:
                raise
            except (EvalError, ShardsError, OSError):
                continue  # `study run` says it, where the scorer is to run


def _settings(study: Study, config: ScorerConfig, device: str) -> Namespace:
    args = scorer_settings(study, config)
    if args.device == "auto":
        args.device = device
    return args


def _check_counts(study: Study, config: ScorerConfig, args: Namespace, prompts: Prompts) -> None:
    name = str(study.config.prompts or study.benchmark)
    parts = {name: prompts}
    if study.halved:  # settings are chosen on one half of the pictures, and reported on the other
        parts = {f"{study.path}: settle: half of {name}": prompts.half("a")} | parts
    for where, part in parts.items():
        count = len(part.items) * study.images_per_prompt
        SCORERS[config.name].enough(args, count, where)


if __name__ == "__main__":
    exits.run(main)
