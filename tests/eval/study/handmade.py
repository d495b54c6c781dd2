"""A study whose sets and scores are made by hand, where no training is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import configs
from eval.study.study import Study
from tests.eval.sets import PROMPTS, VAE, make_items, make_score, make_set, training
from train.config import TrainConfig

DEMO = Path("configs/demo/train.yaml")
PRIMARY, OTHER = "clipscore-vit-b-32", "genai-vqascore-tiny"  # of which the second is better lower
VAES = "acdef"


def open_study(folder: Path, **values: Any) -> Study:
    """A study of two entries in three seeds, with other values of its YAML."""
    train = folder / "train.yaml"
    words = ["data.root=cache", "data.sources=[pets]", "data.latents=flux", "data.text=words"]
    base = configs.load(TrainConfig, DEMO, [*words, "data.also=[]", "steps=100"])
    train.write_text(yaml.safe_dump(base.model_dump(mode="json", exclude_defaults=True)))
    config = {
        "train": str(train), "entries": {"flux": "flux", "e2e": "flux-e2e"}, "prompts": "prompts.txt",
        "scorers": ["clipscore", "genai"], "checkpoints": 1, "settle": None,
    }  # fmt: skip
    path = folder / "fair.yaml"
    path.write_text(yaml.safe_dump(config | values, sort_keys=False))
    return Study.open(path, folder / "out")


def fill(
    study: Study, gaps: Sequence[float], scatter: float = 0.02,
    skip: Sequence[tuple[str, int]] = (), same: bool = False,
) -> Study:  # fmt: skip
    """Makes all sets but those to skip, each with two scores that move by its entry's gap and, by
    chance, by `scatter` a seed; the `same` pictures for all entries, or others.
    """
    random = np.random.default_rng(7)
    own = random.normal(1, 0.2, len(PROMPTS.items))
    for i, (name, gap) in enumerate(zip(study.entries, gaps, strict=True)):
        for seed in study.seeds:
            moved = scatter * random.normal()
            for step in study.steps:
                noise = random.normal(0, 0.05, len(own)) if scatter else 0
                values = own + gap * step / study.steps[-1] + moved + noise
                if (name, seed) not in skip:
                    _make(study.set_folder(name, seed, step), 0 if same else i, seed, step, values)
    return study


def _make(folder: Path, i: int, seed: int, step: int, values: Any) -> None:
    vae = VAE | {"data.sources.0.latents.encoder.weights": VAES[i] * 64} if i else {}
    make_set(
        folder,
        {"vae": VAES[i] * 64, "weights": f"{i}{seed}" * 32, "step": step}, seed=9 * i + seed,
        provenance={"device": "cuda", "seconds": 90.0, "ranks": 2},
        trained=training({**vae, "seed": seed, "step": step}),
    )  # fmt: skip
    make_score(folder, PRIMARY, make_items(values), seconds=12.0)
    make_score(folder, OTHER, make_items(10 - values), better="lower", seconds=3.0)
