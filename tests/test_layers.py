"""Which package may import what, read from the syntax trees (also the imports inside functions)."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("configs", "shards", "encode", "train", "eval")

# package -> the others of ours that it may import
MAY = {
    "configs": (),
    "shards": (),
    "encode": ("configs", "shards"),
    "train": ("configs", "shards"),
    "eval": ("configs", "shards", "encode", "train"),
}
# package -> its public parts. Other packages import what the package itself lists in `__all__`, what
# a folder of these lists in its `__all__`, and names without an underscore that a file of these
# defines; all else is private. CONTRIBUTING.md repeats the list with a line of why.
PUBLIC = {
    "configs": (),
    "shards": (
        "charts",
        "column",
        "console",
        "exits",
        "format",
        "format.atomic",
        "format.checks",
        "launch",
        "lazy",
        "places",
        "printing",
        "probe",
        "processes",
        "read",
        "signals",
        "store",
    ),
    "encode": ("errors", "models", "registry", "source"),
    "train": (
        "checkpoints.checkpoint",
        "checkpoints.folders",
        "checkpoints.identity",
        "checkpoints.norm",
        "checkpoints.reference",
        "checkpoints.snapshots",
        "config",
        "model",
        "plan",
        "report",
        "run",
    ),
}
# listed by a folder for scripts alone
FOR_SCRIPTS = {"train.model": {"DiTConfig", "FlowConfig", "ModelConfig"}}
# heavy library -> the only places that may import it
HEAVY = {
    "diffusers": ("encode.models", "eval.demo.vae"),
    "transformers": (
        "encode.models",
        "eval.features.networks",
        "eval.features.pretrained",
    ),
    "ray": ("encode.run",),
    "pyarrow": ("encode.pack.parquet",),
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
    "shards": ("format", "store", "column", "read", "probe", "tools"),
    "encode": ("source", "pack", "models", "plan", "report", "run"),
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
        "study",
    ),
}
MOST_FILES = 15  # Python files of a folder
# run in an environment that has none of ours: they may import each other alone
ALONE = (
    "tests.bench.reading.samples",
    "tests.bench.reading.measure",
    "tests.bench.reading.peers",
    "tests.bench.reading.remote.passes",
    "tests.bench.reading.remote.peers",
)


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
    """Imports of a file that the rules forbid, each with file, line and what to do instead."""
    package = module.split(".")[0]
    found = []
    for line, name in imports(module, ast.parse(source)):
        top = name.split(".")[0]
        where = f"{module.replace('.', '/')}.py:{line} imports {name}"
        if name in ("eval", "train"):
            found.append(f"{where}, hiding a builtin or a method: write from {name} import x")
        elif top in OURS and top != package:
            if top not in MAY[package]:
                allowed = ", ".join(MAY[package]) or "nothing of ours"
                found.append(f"{where}: {package} may import {allowed}")
            elif not public(name):
                found.append(f"{where}, which is private to {top}: {instead(name)}")
        if top in HEAVY and not within(module, HEAVY[top]):
            found.append(f"{where}: only {', '.join(HEAVY[top])} may")
    return found


@cache
def offered(part: str) -> frozenset[str]:
    """The public names of a package, of a folder of it (those in `__all__`) or of a file (those that
    it defines, without an underscore).
    """
    path = ROOT / part.replace(".", "/")
    folder = path.is_dir()
    tree = ast.parse((path / "__init__.py" if folder else path.with_suffix(".py")).read_text())
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if not isinstance(target, ast.Name):
                continue
            if folder and target.id == "__all__":
                return frozenset(ast.literal_eval(node.value))
            names.add(target.id)
    return frozenset(name for name in names if not name.startswith("_"))


def faces(package: str) -> list[str]:
    return [package, *(f"{package}.{part}" for part in PUBLIC[package])]


def public(name: str) -> bool:
    """Whether another package may import a name: a public part, or a public name of it."""
    parts = faces(name.split(".")[0])
    part, _, leaf = name.rpartition(".")
    return name in (parts[1:] or parts) or (part in parts and leaf in offered(part))


def instead(name: str) -> str:
    """What to write in place of an import of what is private."""
    package, leaf = name.split(".")[0], name.rpartition(".")[2]
    homes = [part for part in faces(package) if leaf in offered(part)]
    if homes and leaf != package:
        return f"write from {homes[0]} import {leaf}"
    parts = [part for part in faces(package) if (ROOT / part.replace(".", "/")).is_dir()]
    return f"import a name that is listed in __all__ of {', '.join(parts)}, or list it there"


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
        ("eval.demo.vae", "import diffusers", False),
        ("eval.demo.page", "import diffusers", True),
    ],
)
def test_the_rules_themselves(module: str, source: str, bad: bool) -> None:
    assert bool(complaints(module, source)) == bad


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("from train.model import DiT, FlowConfig", ""),
        ("from train import DiT, model", ""),  # of the package; a public folder of it
        ("from shards import charts\nfrom shards.console import Bar", ""),
        ("import shards.charts as charts", ""),
        ("from train.config import TrainConfig", ""),
        ("def f():\n    from encode.models import Vae", ""),
        ("from ..errors import EvalError", ""),
        ("def f():\n    from encode.models.vae import Vae", "write from encode.models import Vae"),
        ("from shards.read.order import Order", "write from shards import Order"),
        ("from shards.column.lease import Lease", "write from shards.column import Lease"),
        ("from train.model.flow import sigmas", "list it there"),  # by no face
        ("from train.step.engine import start", "list it there"),
        ("from train.model import dit", "list it there"),  # a file of a public folder
        ("from train import step", "list it there"),
        ("from shards.read import *", "list it there"),
        ("from shards.format import _anything", "list it there"),
        ("from shards.console import _anything", "list it there"),
        ("from shards.console import argparse", "list it there"),  # which it only imports
        ("import shards.read.order", "list it there"),
        ("import shards", "list it there"),
        ("import train", "write from train import x"),
        ("import configs\nfrom configs import ConfigError", ""),  # of one file, without parts
    ],
)
def test_the_rule_of_public_names(source: str, advice: str) -> None:
    report = complaints("eval.images.sampler", source)
    assert len(report) == bool(advice)
    line = source.count("\n") + 1
    for text in report:
        assert text.startswith(f"eval/images/sampler.py:{line} imports ")
        assert text.endswith(advice)


def test_each_public_part_is_imported_by_another_package() -> None:
    used: dict[str, set[str]] = {}
    for module, path in modules():
        for _, name in imports(module, ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] != module.split(".")[0]:
                part, _, leaf = name.rpartition(".")
                used.setdefault(part, set()).add(leaf)
                used.setdefault(name, set())
    for package in PUBLIC:
        for part in faces(package)[1:]:
            assert part in used, f"{part} is public, and nothing imports it: take it off the list"
            if (ROOT / part.replace(".", "/")).is_dir():
                names = offered(part) - used[part] - FOR_SCRIPTS.get(part, set())
                assert names == set(), f"{part} lists what no other package imports"


@pytest.mark.parametrize("part", [*(face for package in PUBLIC for face in faces(package)), "eval"])
def test_each_listed_name_exists(part: str) -> None:
    """Also those that are loaded when first used, which mypy sees under TYPE_CHECKING alone."""
    module = importlib.import_module(part)
    assert [name for name in sorted(offered(part)) if not hasattr(module, name)] == []
    assert not hasattr(module, "no_such_name")


def test_contributing_names_each_public_part() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## What other packages may import")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:shards|encode|train)\.[\w.]+)`", section))
    assert named == {part for package in PUBLIC for part in faces(package)[1:]}


@pytest.mark.parametrize("module", ALONE)
def test_what_runs_beside_other_libraries_imports_none_of_ours(module: str) -> None:
    assert alone(module, (ROOT / f"{module.replace('.', '/')}.py").read_text()) == []


def test_the_rule_of_what_runs_alone() -> None:
    assert alone(ALONE[2], "from .samples import Batch\nimport torch") == []
    for source in ("from shards.read.order import Order", "from .readers import raw"):
        assert len(alone(ALONE[2], source)) == 1


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
