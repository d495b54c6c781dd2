"""Small sets of pictures with scores, as `generate` and `score` leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.images import runs
from eval.images.imageset import ImageSetReader, ImageSetWriter
from eval.prompts.prompts import Prompt, Prompts
from eval.scores import results
from eval.scores.aggregate import aggregate
from eval.scores.results import Item, Score, Value

GROUPS = ("counting", "colors", "position")
PROMPTS = Prompts("bench", tuple(
    Prompt(f"{i:03d}", f"prompt <{i}> & \"more\"", GROUPS[i % 3]) for i in range(30)
))  # fmt: skip
SETTINGS = {
    "weights": "1" * 64, "vae": "a" * 64, "text_encoder": "b" * 64, "step": 100, "ema": True, "sampler": "euler",
    "num_inference_steps": 25, "guidance_scale": 6.0, "batch_size": 32, "seed": 42,
}  # fmt: skip


# What `train.checkpoints.identity.training_of` says of a small run's checkpoint.
TRAINING: dict[str, Any] = {
    "model": {
        "layers": 7,
        "hidden_size": 64,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "mlp_size": 96,
        "in_channels": 4,
        "out_channels": 4,
        "text_width": 12,
    },
    "optim": {"lr": 1.5e-3},
    "ema": {"decay": 0.9},
    "flow": {},
    "caption_dropout": 0.1,
    "deepspeed": {},
    "global_batch": 32,
    "steps_planned": None,
    "step": 100,
    "position": 3200,
    "seed": 0,
    "order": {"lanes": 32, "window": 0, "weights": None, "valid_rows": ["1" * 64]},
    "data": {
        "truncated": False,
        "sources": [
            {
                "latents": {
                    "encoder": {"class": "Vae", "weights": "a" * 64},
                    "norm": {"shift": [0.0], "scale": [1.0]},
                },
                "text": {"encoder": {"class": "Text", "weights": "b" * 64}},
            }
        ],
    },
    "init": None,
    "changes": [],
}

# Leaves that follow another VAE.
VAE = {
    "data.sources.0.latents.encoder.weights": "c" * 64,
    "data.sources.0.latents.norm.shift": [0.5],
    "model.in_channels": 16,
    "model.out_channels": 16,
}


def training(changes: Mapping[str, Any] = {}) -> dict[str, Any]:
    """TRAINING with other leaves, by dotted path."""
    training: dict[str, Any] = json.loads(json.dumps(TRAINING))
    for path, value in changes.items():
        *above, last = path.split(".")
        at: Any = training
        for key in above:
            at = at[int(key) if isinstance(at, list) else key]
        at[last] = value
    return training


def make_set(
    folder: Path, settings: Mapping[str, Any] = {}, prompts: Prompts = PROMPTS, seed: int = 0, side: int = 24,
    provenance: Mapping[str, Any] = {}, finish: bool = True, trained: Mapping[str, Any] | None = None,
    initial_share: float | None = None,
) -> Path:  # fmt: skip
    """A set of noise; `settings` over SETTINGS, and its training, unless it is not recorded."""
    random = np.random.default_rng(seed)
    images = ImageSetWriter(folder, prompts, {**SETTINGS, **settings})
    if trained is not None:
        weights = {**SETTINGS, **settings}["weights"]
        runs.put(folder, runs.Run(weights, dict(trained), initial_share))
    for file in images.files:
        images.save(file, [random.integers(0, 256, (side, side, 3), np.uint8)])
    if finish:
        images.finish(dict(provenance))
    return folder


def make_items(values: Sequence[float], prompts: Prompts = PROMPTS) -> list[Item]:
    return [
        Item(prompt.id, 0, float(value), (prompt.group,) if prompt.group else ())
        for prompt, value in zip(prompts.items, values, strict=True)
    ]


def make_score(
    folder: Path, scorer: str, items: Sequence[Item] = (), value: float | None = None, **fields: Any
) -> Score:
    """Written beside the pictures: of items, or a bare value of the whole set."""
    images = ImageSetReader.open(folder)
    total, groups = aggregate(items, fields.get("overall", "prompts"), fields.get("unit", 1.0)) if items else (
        Value(value or 0.0), {}
    )  # fmt: skip
    record = {
        "scorer": scorer, "benchmark": images.prompts.benchmark, "value": total, "groups": groups, "better": "higher",
        "prompts": len(images.prompts.items), "pictures": len(images.files), "images": images.digest,
        "prompt_list": images.prompts.digest, "made_by": {"torch": "2.9"},
    }  # fmt: skip
    score = Score(**record | fields)
    results.write(folder, score, items)
    return score


def seeded(folder: Path, seeds: dict[str, tuple[int, ...]], gap: float = 0.5) -> list[Path]:
    """Two VAEs, each of several training seeds: the second is better by about `gap`, with a spread between seeds."""
    random = np.random.default_rng(3)
    prompts = random.normal(0, 0.3, len(PROMPTS.items))
    folders = []
    for i, (name, own) in enumerate(seeds.items()):
        for seed in own:
            at = folder / (f"{name}-seed{seed}" if seed else name)
            weights = f"{i}{seed}" * 32
            trained = training((VAE if i else {}) | {"seed": seed})
            make_set(
                at, {"vae": "ac"[i] * 64, "weights": weights}, seed=9 * i + seed, trained=trained
            )
            values = (
                prompts
                + gap * i
                + 0.02 * seed * (1 + i)
                + random.normal(0, 0.05, len(PROMPTS.items))
            )
            make_score(at, "clip", make_items(values))
            folders.append(at)
    return folders
