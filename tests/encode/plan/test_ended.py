"""A plan in a process of its own that is stopped, or that nobody reads to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encode.tiny_models import Models
from tests.encode.toy import jpeg, write_config

ROOT = Path(__file__).parents[3]
PLAN = ["plan", "toy.yaml", "--seconds"]
STEPS = {
    "SIGINT": ("Survey", "looking into pictures"), "SIGTERM": ("probe", "trying its encoder"),
}  # fmt: skip
ENDLESS = """
import runpy, sys, time
from encode.plan import plan
name = sys.argv.pop(1)
step = getattr(plan, name)  # it is sure to be at work when the signal comes
setattr(plan, name, lambda *words: (step(*words), time.sleep(600)))
runpy.run_module('encode', run_name='__main__', alter_sys=True)
"""


@pytest.fixture
def folder(tmp_path: Path, models: Models) -> Path:
    """A folder with a config, pictures that are not packed, and an empty one for temporary files."""
    for name in ("photos", "tmp"):
        (tmp_path / name).mkdir()
    for i in range(12):
        (tmp_path / f"photos/{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"photos/{i}.txt").write_text(f"picture {i}")
    root, photos = tmp_path / "cache", str(tmp_path / "photos")
    write_config(tmp_path / "toy.yaml", root, photos, models, scratch=str(tmp_path / "tmp"))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}


@pytest.mark.parametrize("name", STEPS)
def test_a_stopped_plan_leaves_nothing_behind(name: str, folder: Path) -> None:
    before, number = files(folder), signal.Signals[name]
    function, step = STEPS[name]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, function, *PLAN, "600"], cwd=folder, env=environment(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        log: list[str] = []
        for line in process.stderr:
            log.append(line)
            if step in line:
                break
        process.send_signal(number)
        output, rest = process.communicate(timeout=60)
    assert step in log[-1], log
    # as a shell says it: 128 + n, by the process itself or by the signal
    code = 128 - process.returncode if process.returncode < 0 else process.returncode
    assert (code, output) == (128 + number, "")
    assert rest in ("", f"stopped by {name}\n")
    assert files(folder) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_the_first_line_ends_a_plan_in_silence(unbuffered: str, folder: Path) -> None:
    before = files(folder)
    shell = f"set -o pipefail; {subprocess.list2cmdline([sys.executable, '-m', 'encode', *PLAN, '0'])} | head -1"
    result = subprocess.run(
        ["bash", "-c", shell], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**environment(folder), "PYTHONUNBUFFERED": unbuffered, "COLUMNS": "40"},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "column: toy/text\n"), result.stderr
    assert result.stderr == "source toy: looking into pictures\n"
    assert files(folder) == before
