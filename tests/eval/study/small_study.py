"""A study of small real models: pictures, two VAEs, a text encoder, and the tars that they encode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from encode.config import EncodeConfig
from encode.run.job import run as encode
from eval.study.reuse import recorded_digest
from tests.encode.toy import jpeg, save_gemma, save_kl, tar_bytes
from tests.train.conftest import TINY

ROOT = Path(__file__).parents[3]
SIDE = 32  # pixels
ROWS = 48
WORDS = [
    "a",
    "photograph",
    "of",
    "an",
    "astronaut",
    "who",
    "rides",
    "a",
    "horse",
    "on",
    "the",
    "moon",
]


def write_inputs(folder: Path, rows: int = ROWS) -> Path:
    """Tars, models, a column of text and one of latents, prompts, and the configs of train and encode."""
    members = []
    for n in range(rows):
        caption = " ".join(WORDS[: 2 + n % 9])
        members += [(f"{n:04d}.jpg", jpeg(n, quality=90)), (f"{n:04d}.txt", caption.encode())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.tar").write_bytes(tar_bytes(members))
    save_kl(folder / "kl")
    save_kl(folder / "other", seed=1)
    save_gemma(folder / "gemma")
    text = {"class": "GemmaModel", "path": str(folder / "gemma")}
    base = {
        "root": str(folder / "cache"), "sources": {"pets": str(folder / "0.tar")}, "shard_rows": 1024,
        "engine": {"executor": "inline", "device": "cpu", "batch": 8},
    }  # fmt: skip
    columns = {
        "plain": {"kind": "moments", "encoder": vae(folder, "kl"), "resolution": SIDE},
        "text": {"kind": "tokens", "encoder": text, "max_tokens": 32},
    }
    encode(EncodeConfig.model_validate(base | {"columns": columns}))
    write(folder / "encode.yaml", base | {"columns": {}})
    write(
        folder / "train.yaml",
        {
            "data": {
                "root": str(folder / "cache"), "sources": ["pets"], "latents": "plain", "text": "text", "lanes": 8,
            },
            "model": {**TINY, "hidden_size": 64}, "optim": {"lr": 3e-3}, "ema": {"decay": 0.5}, "steps": 6,
            "global_batch": 8, "micro_batch": 8, "log_every": 2, "save_every": 2, "keep": 2,
        },
    )  # fmt: skip
    prompts = {f"face/{n}".replace("/", "-"): " ".join(WORDS[n:]) for n in range(6)}
    (folder / "few.json").write_text(json.dumps(prompts))
    return folder


def vae(folder: Path, name: str) -> dict[str, str]:
    return {"class": "AutoencoderKL", "path": str(folder / name)}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def study_yaml(folder: Path, name: str = "fair", **values: Any) -> Path:
    """The study of `plain`, whose column exists, against `other`, which is encoded first."""
    other = {"latents": "other", "encoder": vae(folder, "other"), "resolution": SIDE}
    study = {
        "train": str(folder / "train.yaml"), "entries": {"plain": "plain", "other": other}, "seeds": [0],
        "prompts": str(folder / "few.json"), "scorers": ["demo-acc"], "encode": str(folder / "encode.yaml"),
        "generate": {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 6}, "ranks": 1,
        "reuse": [], "checkpoints": 1, "settle": None,
    }  # fmt: skip
    return write(folder / f"{name}.yaml", study | values)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def study(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs a verb of a study in a process of its own."""
    command = [sys.executable, "-m", "eval", "study", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )


def training_of(config: Path, worker: subprocess.Popen[Any]) -> int:
    """Returns the process that trains by a config, once its worker has started it."""
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if str(config).encode() in words and words[1:3] == [b"-m", b"train"]:
                    return int(folder.name)
        assert worker.poll() is None, f"exit code {worker.returncode}"
        time.sleep(0.02)


def numbers(out: Path) -> dict[str, Any]:
    """All that was scored, and the pictures' digests, by the path of the set."""
    return {
        str(folder.relative_to(out)): [
            recorded_digest(folder),
            *(
                json.loads(path.read_bytes())["value"]
                for path in sorted(folder.glob("scores/*.json"))
            ),
        ]
        for folder in sorted(out.glob("images/*/step-*"))
    }
