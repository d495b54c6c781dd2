"""Small sets of pictures with scores, as `generate` and `score` leave them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import results
from eval.aggregate import aggregate
from eval.imageset import Images, ImageSet
from eval.prompts import Prompt, Prompts
from eval.results import Item, Score, Value

GROUPS = ("counting", "colors", "position")
PROMPTS = Prompts("bench", tuple(
    Prompt(f"{i:03d}", f"prompt <{i}> & \"more\"", GROUPS[i % 3]) for i in range(30)
))  # fmt: skip
SETTINGS = {
    "weights": "1" * 64, "vae": "a" * 64, "text_encoder": "b" * 64, "step": 100, "ema": True, "sampler": "euler",
    "num_inference_steps": 25, "guidance_scale": 6.0, "batch_size": 32, "seed": 42,
}  # fmt: skip


def make_set(
    folder: Path, settings: Mapping[str, Any] = {}, prompts: Prompts = PROMPTS, seed: int = 0, side: int = 24,
    provenance: Mapping[str, Any] = {}, finish: bool = True,
) -> Path:  # fmt: skip
    """A set of noise; `settings` over SETTINGS."""
    random = np.random.default_rng(seed)
    images = ImageSet(folder, prompts, {**SETTINGS, **settings})
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
    images = Images.open(folder)
    made, groups = aggregate(items, fields.get("overall", "prompts"), fields.get("unit", 1.0)) if items else (
        Value(value or 0.0), {}
    )  # fmt: skip
    told = {
        "scorer": scorer, "benchmark": images.prompts.benchmark, "value": made, "groups": groups, "better": "higher",
        "prompts": len(images.prompts.items), "pictures": len(images.files), "images": images.digest,
        "prompt_list": images.prompts.digest, "made_by": {"torch": "2.9"},
    }  # fmt: skip
    score = Score(**told | fields)
    results.write(folder, score, items)
    return score
