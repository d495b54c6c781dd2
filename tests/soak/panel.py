"""How well figures of a column, known before any training, order latent spaces by what training on them gives.

outcome    demo-fd of the pictures of two trainings on each latent space of `variants` and on the demo's own two
placebo    a latent space with rotated channels trains as the one that it was made of does
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

from tests.soak.variants import CLASS, VARIANTS, save_variant

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "soak/panel"  # kept: a killed soak goes on where it was
CONFIGS = ROOT / "configs/demo"
VAES = ("vae-plain", "vae-equi")
SOURCES = {"openmoji": "{00000..00007}", "openmoji-val": "00000"}
SEEDS = (0, 1)


def prepare(folder: Path) -> None:
    """Makes pictures, columns and the study's YAML, where they are missing."""
    if not (folder / "data/prompts.json").exists():
        python("eval.demo.data", folder / "data")
    held_out = folder / "held-out"
    if not held_out.exists():
        with tarfile.open(folder / "data/openmoji-val/00000.tar") as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            tar.extractall(held_out, members, filter="data")
    encode(
        folder,
        "base",
        {vae: {"class": "AutoencoderKL", "path": str(CONFIGS / vae)} for vae in VAES},
    )
    encoders = {}
    for name, (vae, kind) in VARIANTS.items():
        path = folder / "vaes" / name
        if not (path / "variant.safetensors").exists():
            save_variant(kind, CONFIGS / vae, folder / "cache/openmoji" / vae, path)
        encoders[name] = {"class": CLASS, "path": str(path)}
    encode(folder, "variants", encoders)
    train = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    del train["runs"], train["data"]["latents"]
    train["data"]["text"] = f"{folder}/cache/openmoji/minilm"
    train["validation"]["source"] = f"{folder}/cache/openmoji-val"
    write(folder / "train.yaml", train)
    entries = [*VAES, *VARIANTS]
    study = {
        "train": f"{folder}/train.yaml",
        "entries": {name: f"{folder}/cache/openmoji/{name}" for name in entries},
        "seeds": list(SEEDS),
        "prompts": f"{folder}/data/prompts.json",
        "scorers": [{"demo-fd": {"reference": str(held_out), "label": "held-out"}}],
        "generate": {"guidance_scale": 3, "batch_size": 70, "allow-class": [CLASS]},
        "reuse": [],
    }
    write(folder / "study.yaml", study)


def encode(folder: Path, name: str, encoders: dict[str, dict[str, str]]) -> None:
    """Encodes both sources by each encoder; by the demo's text encoder too where VAES are made."""
    config = yaml.safe_load((CONFIGS / "encode.yaml").read_text())
    columns = {
        each: {"kind": "moments", "encoder": encoder, "resolution": 64}
        for each, encoder in encoders.items()
    }
    if name == "base":
        columns["minilm"] = config["columns"]["minilm"]
    config |= {
        "root": f"{folder}/cache",
        "sources": {
            source: f"{folder}/data/{source}/{tars}.tar" for source, tars in SOURCES.items()
        },
        "columns": columns,
        "engine": {"workers": 1},
    }
    write(folder / f"encode-{name}.yaml", config)
    python("encode", "run", folder / f"encode-{name}.yaml")


def study(folder: Path) -> None:
    """Trains, samples and scores what is missing."""
    python("eval", "study", "run", folder / "study.yaml", "--out", folder / "study", "--jobs", 2)


def outcomes() -> Path:
    """Returns the folder of the finished study, made by one process at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(FOLDER)
        study(FOLDER)
    return FOLDER / "study"


def write(path: Path, config: object) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def python(*words: object) -> None:
    """AssertionError, with the end of its output, where a command fails."""
    command = [sys.executable, "-m", *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, f"{' '.join(command)}: {(ended.stdout + ended.stderr)[-1000:]}"
