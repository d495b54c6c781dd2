"""The benchmark of a GPU at toy sizes on a CPU: every part measures something, and what fails has a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def bench(tmp_path: Path, *words: str) -> tuple[int, Any, str]:
    """Returns exit code, JSON and output."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.bench.gpu", "--light", "--json", str(out), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, json.loads(out.read_text()), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        ("matmul", {"tflops"}),
        ("encode", {"rows_per_s_bare", "rows_per_s_engine", "engine_over_bare"}),
        ("train", {"samples_per_s", "memory_gb", "plan_gb", "optimizer_share"}),
        ("generate", {"pictures_per_s"}),
    ],
)
def test_each_part(tmp_path: Path, part: str, figures: set[str]) -> None:
    code, results, output = bench(tmp_path, "--only", part)
    assert code == 0, output
    rows = results["parts"][part]["rows"]
    assert rows
    for row in rows:
        assert all(row[figure] > 0 for figure in figures), row
    assert f"{part}: at most" in output


def test_a_part_beyond_its_limit_has_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    code, results, output = bench(tmp_path, "--only", "generate", "matmul", "--limit", "1")
    assert code == 1
    assert results["parts"]["generate"]["error"] == "took longer than 1 s"
    assert set(results["parts"]) == {"generate", "matmul"}
    assert "FAILED" in output


def test_without_a_gpu_it_ends_at_once() -> None:
    command = [sys.executable, "-m", "tests.bench.gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no CUDA device is visible; --light runs toy sizes on a CPU" in result.stderr
