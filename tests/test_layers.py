"""Which package may import what, read from the syntax trees (also the imports inside functions)."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("configs", "shards", "encode", "train", "eval")

# package -> the parts of ours that it may import beside its own
MAY = {
    "configs": (),
    "shards": (),
    "encode": ("configs", "shards"),
    "train": ("configs", "shards"),
    "eval": (
        "configs",
        "shards",
        "encode",
        "train.model",
        "train.reference",
        "train.flow",
        "train.identity",
        "train.loop",
        "train.run",
        "train.checkpoint",
        "train.config",
        "train.page",
        "train.world",
    ),
}
# heavy library -> the only places that may import it
HEAVY = {
    "diffusers": ("encode", "eval.demo.vae"),
    "transformers": ("encode", "eval.networks", "eval.pretrained"),
    "ray": ("encode",),
    "deepspeed": ("train",),
    "torch": (
        "shards.stream",
        "shards.latents",
        "shards.randomness",
        "shards.bench",
        "encode.encoders",
        "encode.features",
        "encode.loading",
        "encode.packed",
        "encode.pixels",
        "encode.rehearsal",
        "encode.text",
        "encode.vae",
        "encode.bench",
        "train",
        "eval",
    ),
}
# run in an environment that has none of ours: they may import each other alone
ALONE = ("shards.bench.samples", "shards.bench.measure", "shards.bench.peers")


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for package in OURS
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            folder = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*folder, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def complaints(module: str, source: str) -> list[str]:
    package = module.split(".")[0]
    found = []
    for line, name in imports(module, ast.parse(source)):
        top = name.split(".")[0]
        if top in OURS and top != package and not within(name, MAY[package]):
            found.append(f"{module}:{line} imports {name}")
        if top in HEAVY and not within(module, HEAVY[top]):
            found.append(f"{module}:{line} imports {name}")
        if module in ALONE and top in OURS and not within(name, ALONE):
            found.append(f"{module}:{line} imports {name}")
        if name in ("eval", "train"):
            found.append(
                f"{module}:{line} hides a builtin or a method: write from {name}.x import y"
            )
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value)[-40:])
def test_import_directions(module: str, path: Path) -> None:
    assert complaints(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("shards.stream", "import torch\nfrom .schema import Norm", False),
        ("shards.schema", "import torch", True),
        ("shards.schema", "from configs import load", True),
        ("train.loop", "from shards import Batch", False),
        ("train.loop", "def f():\n    from encode.registry import build_vae", True),
        ("train.loop", "from diffusers import AutoencoderKL", True),
        ("encode.job", "import ray.util\nfrom .source import read_tar", False),
        ("encode.job", "from ..train import model", True),
        ("encode.job", "import torch", True),
        ("encode.job", "from train.model import DiT", True),
        ("eval.sampler", "from train.flow import sigmas\nfrom train import model", False),
        ("eval.sampler", "from train.engine import start", True),
        ("eval.sampler", "import train", True),
        ("shards.bench.peers", "from .samples import Batch\nimport torch", False),
        ("shards.bench.peers", "from ..order import Order", True),
        ("shards.bench.peers", "from .readers import raw", True),
        ("shards.bench.readers", "from ..order import Order", False),
        ("eval.demo.vae", "import diffusers", False),
        ("eval.demo.page", "import diffusers", True),
    ],
)
def test_the_rules_themselves(module: str, source: str, bad: bool) -> None:
    assert bool(complaints(module, source)) == bad


def test_commands_and_those_who_decode_wait_for_no_torch() -> None:
    """A status, a driver on a head node, a decoder on a node without GPU."""
    modules = "shards.__main__ encode.__main__ encode.status encode.cluster encode.remote"
    code = f"import sys, {', '.join(modules.split())}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in OURS
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) >= found
