"""Two workers of a real study that settles: what one worker chooses, and each command once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.study.earlier import take_over
from eval.study.lock import verify
from eval.study.pictures import all_sets
from eval.study.reuse import recorded_digest
from eval.study.study import Study
from tests.eval.study.small_study import ROOT, environment, study, study_yaml, write_inputs

SETTLE = {"guidance_scale": [1, 2], "ema": None, "accept_edge": True}


def pictures_and_scores(fair: Study) -> dict[str, Any]:
    """Returns the pictures' digest and all scores of each set, trials too, by its path in the study."""
    return {
        str(each.folder.relative_to(fair.out)): [
            recorded_digest(each.folder),
            *(
                json.loads(path.read_bytes())["value"]
                for path in sorted(each.folder.rglob("scores/*.json"))
            ),
        ]
        for each in all_sets(fair)
    }


def choices_of(out: Path) -> dict[str, Any]:
    choices: dict[str, Any] = json.loads((out / "study.lock").read_bytes())["settled"]
    return choices


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two studies of some twenty processes, each of which imports torch
def test_two_workers_choose_what_one_chooses(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "small")
    yaml_file = study_yaml(
        folder, seeds=[0, 1], settle=SETTLE, checkpoints=[6],
        generate={"num_inference_steps": 2, "batch_size": 6},
    )  # fmt: skip
    of_one, of_two = folder / "one", folder / "two"
    words = [sys.executable, "-m", "eval", "study", "run", str(yaml_file), "--out", str(of_two)]
    workers = [
        subprocess.Popen(
            words, cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=1200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    alone = study("run", yaml_file, "--out", of_one, "--jobs", 2)
    assert alone.returncode == 0, alone.stdout + alone.stderr

    assert choices_of(of_two) == choices_of(of_one)
    assert choices_of(of_two).keys() == {"plain", "other"}
    fair, expected = (take_over(Study.open(yaml_file, out)) for out in (of_two, of_one))
    values = pictures_and_scores(fair)
    assert values == pictures_and_scores(expected)
    assert len(values) == 2 * 2 * (2 + 1)  # entries, seeds; trials and what is reported
    assert all(len(scores) > 1 for scores in values.values())
    assert verify(fair) == ([], [])

    nodes_of_each = [
        [
            line.partition("done: ")[2].partition(",")[0]
            for line in output.splitlines()
            if "done: " in line
        ]
        for output in outputs
    ]
    assert all(nodes_of_each)  # each has a part in it
    nodes = [node for nodes in nodes_of_each for node in nodes]
    assert sorted(nodes) == sorted(set(nodes))
    assert set(nodes) == {
        json.loads(path.read_bytes())["id"] for path in (of_two / "logs").rglob("*.json")
    }
