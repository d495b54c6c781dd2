"""Verdicts between trainings that differ in the seed alone: there should be few.

seeds   a score: 200 splits of 12 trainings into three against three, each compared as two entries would be

The trainings are of one VAE of the demo, so no split has a truth other than "no difference". The two entries of a study
share their training seeds; those of a split cannot, since each training is on one side. Its six trainings, in an order
drawn by chance, are paired index by index. That is fair: the interval of paired differences asks that they be
independent and centred on the truth, which differences of trainings paired by chance are. What a shared seed does to
both sides would only make differences smaller.

A right interval gives a verdict in 5 % of the splits at most. The splits are of the same 12 trainings, so their share
scatters more than that of independent studies; 10 % is the limit.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from math import sqrt
from pathlib import Path

import numpy as np
import yaml

from eval.report.compare import Difference, Entry, compare
from eval.report.entries import ScoredSet, open_all
from tests.memory import MEMORY, kept
from tests.soak.drawn import digest_of
from tests.soak.sweep import Case, Sweep

ROOT = Path(__file__).parents[2]
SCRATCH = os.environ.get("LATENTBANK_SCRATCH") or MEMORY
TRAININGS, SIDE, SPLITS, MOST = 12, 3, 200, 0.1
STEPS, PROMPTS = 300, 140
SECONDS = 4 * 3600  # all trainings are within the first case
SCORERS = ("demo-fd", "demo-acc")


def check(scorer: str) -> Mapping[str, Sequence[int]]:
    """AssertionError where more splits have a verdict than a right interval gives."""
    return share_of_verdicts(trained(), scorer)


def share_of_verdicts(
    sets: Sequence[ScoredSet], scorer: str, splits: int = SPLITS
) -> Mapping[str, Sequence[int]]:
    """Digests of the splits, by scorer and by whether there was a verdict."""
    chance = np.random.default_rng(0)
    name = next(name for name in sets[0].scores if name.startswith(scorer))
    outcomes: dict[str, list[int]] = {}
    for _ in range(splits):
        drawn = chance.permutation(len(sets))[: 2 * SIDE].tolist()
        difference = between(sets, drawn, name)
        for rule, verdict in (("", difference.resolved), (", by 1.96", by_normal(difference))):
            kind = f"{scorer}{rule}: {'verdict' if verdict else 'no verdict'}"
            outcomes.setdefault(kind, []).append(digest_of(scorer, tuple(drawn)))
    share = len(outcomes.get(f"{scorer}: verdict", ())) / splits
    assert share <= MOST, (
        f"{share:.1%} of {splits} splits have a verdict, expected at most {MOST:.0%}"
    )
    return outcomes


def between(sets: Sequence[ScoredSet], drawn: Sequence[int], scorer: str) -> Difference:
    """The difference of two entries of three sets each, paired by their places."""
    a, b = (
        Entry(name, {i: sets[index] for i, index in enumerate(side)})
        for name, side in (("a", drawn[:SIDE]), ("b", drawn[SIDE:]))
    )
    return next(each for each in compare(a, b).differences if each.scorer == scorer)


def by_normal(difference: Difference) -> bool:
    """Whether there would be a verdict with 1.96 in place of Student's t."""
    assert difference.value is not None
    assert difference.parts is not None
    variance = (difference.parts.seeds or 0.0) + difference.parts.of_prompts
    return abs(difference.value.value) > 1.96 * sqrt(variance)


# The trainings -----------------------------------------------------------------------------------


@cache
def trained() -> list[ScoredSet]:
    """Pictures of 12 trainings with their scores, made once by whichever process comes first."""
    folder = (Path(SCRATCH) if SCRATCH else kept()) / "seeds"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
    return open_all(pictures(folder))


def pictures(folder: Path) -> list[Path]:
    return [folder / f"images/seed{seed}" for seed in range(1, TRAININGS + 1)]


def make(folder: Path) -> None:
    """By the commands that a user has: data, columns, trainings, pictures, scores."""
    python("eval.demo.data", folder / "data")
    prompts = json.loads((folder / "data/prompts.json").read_text())
    every = len(prompts) // PROMPTS
    (folder / "prompts.json").write_text(json.dumps(dict(list(prompts.items())[::every])))
    with tarfile.open(folder / "data/openmoji-val/00000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        tar.extractall(folder / "held-out", members, filter="data")
    encode = yaml.safe_load((ROOT / "configs/demo/encode.yaml").read_text())
    del encode["columns"]["vae-equi"]
    encode |= {
        "root": f"{folder}/cache",
        "sources": {"openmoji": f"{folder}/data/openmoji/{{00000..00007}}.tar"},
        "engine": {"workers": 1},
    }
    (folder / "encode.yaml").write_text(yaml.safe_dump(encode))
    python("encode", "run", folder / "encode.yaml")
    train = yaml.safe_load((ROOT / "configs/demo/train.yaml").read_text())
    del train["validation"]
    column = f"{folder}/cache/openmoji"
    train |= {
        "data": {"latents": f"{column}/vae-plain", "text": f"{column}/minilm", "lanes": 32},
        "steps": STEPS, "save_every": STEPS, "runs": f"{folder}/runs",
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    for images in pictures(folder):
        run = folder / f"runs/train-vae-plain-{images.name}"
        python("train", folder / "train.yaml", images.name.replace("seed", "seed="))
        python(
            "eval", "generate", "--checkpoint", run, "--prompts", folder / "prompts.json",
            "--save_dir", images, "--guidance_scale", 3, "--batch_size", 70,
        )  # fmt: skip
        shutil.rmtree(run)  # 50 MB each, in memory
    sets = pictures(folder)
    python("eval", "score", SCORERS[0], *sets, "--reference", folder / "held-out")
    python("eval", "score", SCORERS[1], *sets)


def python(*words: object) -> None:
    """AssertionError, with the end of its output, where a command fails."""
    command = [sys.executable, "-m", *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, f"{' '.join(command)}: {(ended.stdout + ended.stderr)[-1000:]}"


def cases() -> list[Case]:
    return [(scorer,) for scorer in SCORERS]


SWEEP = Sweep(
    "seeds", "a score, of 200 splits of 12 training seeds of one VAE into three against three",
    cases, check, lambda case: str(case[0]), seconds=SECONDS,
)  # fmt: skip
