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
        "train.checkpoints.reference",
        "train.model.flow",
        "train.checkpoints.identity",
        "train.loop",
        "train.run",
        "train.checkpoints.checkpoint",
        "train.config",
        "train.report.page",
        "train.report.records",
        "train.ranks.world",
    ),
}
# heavy library -> the only places that may import it
HEAVY = {
    "diffusers": ("encode.models", "eval.demo.vae"),
    "transformers": (
        "encode.models",
        "eval.features.networks",
        "eval.features.pretrained",
    ),
    "ray": ("encode.run",),
    "deepspeed": ("train",),
    "torch": (
        "shards.read.stream",
        "shards.read.latents",
        "shards.read.randomness",
        "encode.models",
        "train",
        "eval",
    ),
}
# package -> its folders, each of which imports only those before it and single files beside them
FLOORS = {
    "shards": ("format", "store", "column", "read", "tools"),
    "encode": ("source", "models", "plan", "report", "run"),
    "train": ("model", "ranks", "step", "checkpoints", "report", "plan"),
    "eval": (
        "prompts",
        "images",
        "features",
        "scores",
        "distances",
        "scorers",
        "report",
        "demo",
    ),
}
MOST_FILES = 15  # Python files of a folder
# run in an environment that has none of ours: they may import each other alone
ALONE = ("tests.bench.reading.samples", "tests.bench.reading.measure", "tests.bench.reading.peers")


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for package in OURS
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def alone(module: str, source: str) -> list[str]:
    """Imports of ours in a file that runs where only its neighbours are."""
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(module, ast.parse(source))
        if name.split(".")[0] in (*OURS, "tests") and not within(name, ALONE)
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
        if name in ("eval", "train"):
            found.append(
                f"{module}:{line} hides a builtin or a method: write from {name}.x import y"
            )
    return found


def graph() -> dict[str, set[str]]:
    """Each module with the modules of ours that it imports, also inside functions, but not for type
    checkers alone.
    """
    named = dict(modules())
    packages = {name.removesuffix(".__init__") for name in named if name.endswith(".__init__")}
    edges: dict[str, set[str]] = {}
    for module, path in named.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []
        edges[module] = set()
        for _, name in imports(module, tree):
            for target in (name, name.rpartition(".")[0]):
                target = f"{target}.__init__" if target in packages else target
                if target in named and target != module:
                    edges[module].add(target)
                    break
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other."""
    reached = {}
    for start in edges:
        reached[start], todo = set[str](), [start]
        while todo:
            for target in edges[todo.pop()] - reached[start]:
                reached[start].add(target)
                todo.append(target)
    groups = {tuple(sorted({a} | {b for b in reached[a] if a in reached[b]})) for a in edges}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def unit(module: str) -> str:
    """A folder of a package, or a file beside the folders."""
    return ".".join(module.split(".")[:2])


def test_no_circle_of_files() -> None:
    assert circles(graph()) == []


def test_no_circle_of_folders() -> None:
    """A package's own `__init__` and `__main__` offer what is below them, and do not count."""
    edges: dict[str, set[str]] = {}
    for module, targets in graph().items():
        if unit(module).endswith(("__init__", "__main__")):
            continue
        kept = {unit(t) for t in targets if not unit(t).endswith(("__init__", "__main__"))}
        edges.setdefault(unit(module), set()).update(kept - {unit(module)})
        for target in kept:
            edges.setdefault(target, set())
    assert circles(edges) == []


def test_folders_import_those_before_them() -> None:
    for module, targets in graph().items():
        package, folder = module.split(".")[0], unit(module).rpartition(".")[2]
        floors = FLOORS.get(package, ())
        if folder not in floors:
            continue
        for target in targets:
            other = unit(target).rpartition(".")[2]
            if target.split(".")[0] == package and other in floors:
                assert floors.index(other) <= floors.index(folder), f"{module} imports {target}"


def test_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_folder_of_too_many_files() -> None:
    folders = {
        path.parent for package in (*OURS, "tests") for path in (ROOT / package).rglob("*.py")
    }
    counts = {str(f.relative_to(ROOT)): len(list(f.glob("*.py"))) for f in folders}
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value)[-40:])
def test_import_directions(module: str, path: Path) -> None:
    assert complaints(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("shards.read.stream", "import torch\nfrom ..format.layout import Norm", False),
        ("shards.format.layout", "import torch", True),
        ("shards.format.layout", "from configs import load", True),
        ("train.loop", "from shards import Batch", False),
        ("train.loop", "def f():\n    from encode.registry import build_vae", True),
        ("train.loop", "from diffusers import AutoencoderKL", True),
        ("encode.run.job", "import ray.util\nfrom ..source.tars import read_tar", False),
        ("encode.run.job", "from ...train import model", True),
        ("encode.run.job", "import torch", True),
        ("encode.run.job", "from train.model import DiT", True),
        (
            "eval.images.sampler",
            "from train.model.flow import sigmas\nfrom train import model",
            False,
        ),
        ("eval.images.sampler", "from train.step.engine import start", True),
        ("eval.images.sampler", "import train", True),
        ("eval.demo.vae", "import diffusers", False),
        ("eval.demo.page", "import diffusers", True),
    ],
)
def test_the_rules_themselves(module: str, source: str, bad: bool) -> None:
    assert bool(complaints(module, source)) == bad


@pytest.mark.parametrize("module", ALONE)
def test_what_runs_beside_other_libraries_imports_none_of_ours(module: str) -> None:
    assert alone(module, (ROOT / f"{module.replace('.', '/')}.py").read_text()) == []


def test_the_rule_of_what_runs_alone() -> None:
    assert alone(ALONE[-1], "from .samples import Batch\nimport torch") == []
    for source in ("from shards.read.order import Order", "from .readers import raw"):
        assert len(alone(ALONE[-1], source)) == 1


def test_commands_and_those_who_decode_wait_for_no_torch() -> None:
    """A status, a driver on a head node, a decoder on a node without GPU."""
    modules = "shards.__main__ encode.__main__ encode.report.status encode.run.ray_workers encode.run.remote_decode"
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
