"""Verdicts between trainings: few where they differ in the seed alone, and one where a VAE is worse.

seeds   a score: 200 splits of 12 trainings into three against three, each compared as two entries would be;
        or three trainings against three on latents with noise, which must lose

The trainings of the splits are of one VAE of the demo, so no split has a truth other than "no difference". The two
entries of a study share their training seeds; those of a split cannot, since each training is on one side. Its six
trainings, in an order drawn by chance, are paired index by index. That is fair: the interval of paired differences asks
that they be independent and centred on the truth, which differences of trainings paired by chance are. What a shared
seed does to both sides would only make differences smaller.

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
from math import log, sqrt
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from eval.report.compare import Difference, Entry, compare
from eval.report.entries import ScoredSet, open_all
from tests.memory import kept
from tests.soak.drawn import digest_of
from tests.soak.sweep import Case, Sweep

ROOT = Path(__file__).parents[2]
SCRATCH = os.environ.get("LATENTBANK_SCRATCH")  # of all processes of a soak run, which removes it
TRAININGS, SIDE, SPLITS, MOST = 12, 3, 200, 0.1
STEPS, PROMPTS = 300, 140
PLAIN, NOISY, NOISE = "vae-plain", "vae-noisy", 0.5  # deviation of the noise, of that of latents
SECONDS = 4 * 3600  # all trainings are within the first case
SCORERS = ("demo-fd", "demo-acc")


def check(kind: str, scorer: str) -> Mapping[str, Sequence[int]]:
    """AssertionError where more splits have a verdict than a right interval gives, or the noise has none."""
    if kind == "splits":
        return share_of_verdicts(trained(PLAIN, TRAININGS), scorer)
    comparison = compare(*(
        Entry(latents, {scored.seed: scored for scored in trained(latents, SIDE)})
        for latents in (PLAIN, NOISY)
    ))  # fmt: skip
    difference = next(d for d in comparison.differences if d.scorer.startswith(scorer))
    assert comparison.favours(difference) == PLAIN, f"no verdict against noise: {difference}"
    return {f"{scorer}: noise loses": [digest_of(kind, (scorer,))]}


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


def trained(latents: str, count: int) -> list[ScoredSet]:
    """Pictures of the first trainings on a column, with their scores. What is missing is made, by one
    process at a time.
    """
    folder = scratch()
    folders = [folder / f"images/{latents}-seed{seed}" for seed in range(1, count + 1)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "train.yaml").exists():
            prepare(folder)
        for images in folders:
            if not (images / "scored").exists():
                make(folder, images)
    return open_all(folders)


@cache
def scratch() -> Path:
    folder = (Path(SCRATCH) if SCRATCH else kept()) / "seeds"
    folder.mkdir(exist_ok=True)
    return folder


def prepare(folder: Path) -> None:
    """Data, columns and the training config of all."""
    python("eval.demo.data", folder / "data")
    prompts = json.loads((folder / "data/prompts.json").read_text())
    every = len(prompts) // PROMPTS
    (folder / "prompts.json").write_text(json.dumps(dict(list(prompts.items())[::every])))
    with tarfile.open(folder / "data/openmoji-val/00000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        tar.extractall(folder / "held-out", members, filter="data")
    encode = yaml.safe_load((ROOT / "configs/demo/encode.yaml").read_text())
    del encode["columns"]["vae-equi"]
    vae = add_noise(ROOT / "configs/demo" / PLAIN, folder / NOISY)
    noisy = encode["columns"][PLAIN] | {"encoder": {"class": "AutoencoderKL", "path": str(vae)}}
    encode["columns"][NOISY] = noisy
    encode |= {
        "root": f"{folder}/cache",
        "sources": {"openmoji": f"{folder}/data/openmoji/{{00000..00007}}.tar"},
        "engine": {"workers": 1},
    }
    (folder / "encode.yaml").write_text(yaml.safe_dump(encode))
    python("encode", "run", folder / "encode.yaml")
    train = yaml.safe_load((ROOT / "configs/demo/train.yaml").read_text())
    del train["validation"]
    train |= {
        "data": {"text": f"{folder}/cache/openmoji/minilm", "lanes": 32},
        "steps": STEPS, "save_every": STEPS, "runs": f"{folder}/runs",
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(train))


def make(folder: Path, images: Path) -> None:
    """A training, its pictures and their scores, by the commands that a user has."""
    latents, _, seed = images.name.rpartition("-seed")
    column, run = folder / "cache/openmoji" / latents, folder / f"runs/train-{images.name}"
    python("train", folder / "train.yaml", f"data.latents={column}", f"seed={seed}")
    python(
        "eval", "generate", "--checkpoint", run, "--prompts", folder / "prompts.json",
        "--save_dir", images, "--guidance_scale", 3, "--batch_size", 70,
    )  # fmt: skip
    shutil.rmtree(run)  # 50 MB each, in memory
    python("eval", "score", "demo-fd", images, "--reference", folder / "held-out")
    python("eval", "score", "demo-acc", images)
    (images / "scored").touch()


def add_noise(vae: Path, folder: Path) -> Path:
    """A copy of a VAE whose posterior, of which training draws, is half as wide as all latents are."""
    shutil.copytree(vae, folder)
    scale = json.loads((folder / "config.json").read_text())["scaling_factor"]
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    log_variance = slice(len(weights["encoder.conv_out.bias"]) // 2, None)
    weights["encoder.conv_out.weight"][log_variance] = 0
    weights["encoder.conv_out.bias"][log_variance] = 2 * log(NOISE / scale)
    save_file(weights, path)
    return folder


def python(*words: object) -> None:
    """AssertionError, with the end of its output, where a command fails."""
    command = [sys.executable, "-m", *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, f"{' '.join(command)}: {(ended.stdout + ended.stderr)[-1000:]}"


def cases() -> list[Case]:
    return [*(("splits", scorer) for scorer in SCORERS), ("noise", SCORERS[0])]


SWEEP = Sweep(
    "seeds", "a score of 200 splits of 12 training seeds into three against three, or of a VAE with noise",
    cases, check, lambda case: f"{case[1]}, {case[0]}", seconds=SECONDS,
)  # fmt: skip
