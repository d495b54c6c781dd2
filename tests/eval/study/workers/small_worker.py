"""A worker of a study whose commands are small: each notes that it began, waits, and makes a file.

    python -m tests.eval.study.workers.small_worker STUDY.yaml OUT SECONDS

The nodes are in the YAML's folder, in nodes.json: [name, needs, seconds that it waits or the name of a node
whose beginning it waits for, exit code].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.study.graph import Node
from eval.study.run.runner import Runner
from eval.study.run.workers import Worker
from eval.study.study import Study
from shards import exits
from shards.signals import stoppable
from tests.eval.study.small_study import ROOT, environment, study_yaml

COMMAND = """
import pathlib, sys, time
folder, name, wait, code = sys.argv[1:]
with pathlib.Path(folder, name + ".begun").open("a") as file:
    file.write("begun\\n")
if wait.replace(".", "").isdecimal():
    time.sleep(float(wait))
else:
    while not pathlib.Path(folder, wait + ".begun").exists():
        time.sleep(0.05)
if int(code):
    sys.exit(int(code))
with pathlib.Path(folder, name + ".ended").open("a") as file:
    file.write("ended\\n")
pathlib.Path(folder, name).touch()
"""
NodeLine = tuple[str, list[str], float | str, int]


@dataclass
class Made:
    """Says that a node is done once its outputs are there."""

    def done(self, node: Node) -> bool:
        return all(path.exists() for path in node.outputs)


def small_yaml(folder: Path, name: str = "fair", **values: Any) -> Path:
    """The YAML of a study of which nothing is read but its configs."""
    folder.mkdir(exist_ok=True)
    (folder / "train.yaml").write_text((ROOT / "configs/demo/train.yaml").read_text())
    (folder / "few.json").write_text('{"a": "a"}')
    entries = {"a": str(folder / "a"), "b": str(folder / "b")}
    values = {"entries": entries, "with": [f"data.text={folder}/text"], **values}
    return study_yaml(folder, name, **values)


def write_nodes(folder: Path, *nodes: NodeLine) -> None:
    (folder / "nodes.json").write_text(json.dumps(nodes))


def nodes_in(folder: Path) -> list[Node]:
    return [
        Node(
            id=f"train/{name}",
            kind="train",
            command=("python", "-c", COMMAND, str(folder), name, str(wait), str(code)),
            needs=tuple(f"train/{need}" for need in needs),
            outputs=(folder / name,),
        )
        for name, needs, wait, code in json.loads((folder / "nodes.json").read_bytes())
    ]


class Process(subprocess.Popen[bytes]):
    """A worker as a process of its own, whose output can be read meanwhile."""

    def __init__(self, path: Path, out: Path, seconds: float) -> None:
        words = [sys.executable, "-m", __name__, str(path), str(out), str(seconds)]
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="log-", delete=False) as log:
            self.log = Path(log.name)
            variables = environment() | {"PYTHONUNBUFFERED": "1"}
            super().__init__(words, cwd=ROOT, env=variables, stdout=log, stderr=log)

    def text(self) -> str:
        return self.log.read_text()


def start(path: Path, out: Path, seconds: float) -> Process:
    return Process(path, out, seconds)


def lines(folder: Path, name: str) -> int:
    """How many lines a file has; 0 without one."""
    path = folder / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def work(path: Path, out: Path, seconds: float) -> int:
    study = Study.open(path, out)
    worker = Worker(study, seconds)
    worker.refuse_others()
    worker.join()
    try:
        runner = Runner(study, worker)
        runner.nodes, runner.existing = nodes_in(path.parent), Made()  # type: ignore[assignment]
        runner._encoded = lambda: None  # type: ignore[method-assign]  # there are no columns
        with runner.at_work():
            return runner.go()
    finally:
        worker.leave()


def main() -> int:
    path, out, seconds = sys.argv[1:]
    print(f"pid {os.getpid()}", flush=True)
    return stoppable(lambda: work(Path(path), Path(out), float(seconds)))


if __name__ == "__main__":
    exits.run(main)
