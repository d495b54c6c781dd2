"""Whether the scorers of a study can score its prompts: their weights, flags and references, in a process of its
own, whose memory is free again before anything is trained.

    python -m eval.study.run.ready STUDY.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from shards import exits

from ...prompts.benchmarks import find
from ...score import SCORERS
from ..flags import scorer_settings
from ..study import Study


def main() -> None:
    """Loads each scorer's weights; its named error says what is missing, or which prompt it cannot score."""
    import torch

    study = Study.open(Path(sys.argv[1]))
    prompts = find(study.benchmark, study.config.prompts)
    count = len(prompts.items) * study.images_per_prompt
    halved = len(prompts.half("a").items) * study.images_per_prompt
    for config in study.scorers:
        args = scorer_settings(study, config)
        if args.device == "auto":
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        scorer = SCORERS[config.name]
        scorer.ready(args)
        scorer.suits(args, prompts)
        name = str(study.config.prompts or study.benchmark)
        if study.halved:
            scorer.enough(args, halved, f"a half of {name}")
        scorer.enough(args, count, name)


if __name__ == "__main__":
    exits.run(main)
