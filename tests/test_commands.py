"""Every command says what it is without loading what it does not need; `latentbank` is `python -m`."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.latentbank import STAGES
from tests.shards.toy import moments_spec, tokens_spec, write_column

ROOT = Path(__file__).parents[1]
MODULES = {"encode": "encode.__main__", "shards": "shards.__main__", "train": "train.__main__",
           "eval": "eval.commands"}  # fmt: skip
WAYS = {
    "module": ["-m"],
    "script": ["-c", "import sys; from configs.latentbank import main; sys.exit(main())"],
}
# runs each line of words as a command; says which code it left with, what it printed, what is loaded
HELP = """
import contextlib, io, runpy, sys
for words in sys.argv[1:]:
    sys.argv, out = words.split(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
    assert len(out.getvalue()) > 80, (words, out.getvalue())
    heavy = {"torch", "ray", "transformers", "diffusers", "deepspeed", "zarr", "obstore", "scipy"}
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""


def python(words: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_help_loads_nothing_heavy(stage: str) -> None:
    verbs = importlib.import_module(MODULES[stage]).VERBS
    words = [stage, f"{stage} --help", *(f"{stage} {verb} --help" for verb in verbs)]
    assert len(words) > 6
    result = python(["-c", HELP, *words])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_without_words_it_says_what_to_do_next(stage: str) -> None:
    result = python(["-m", stage])
    assert result.returncode == 0, result.stderr
    for verb in importlib.import_module(MODULES[stage]).VERBS:
        assert f"\n  {verb} " in result.stdout
    assert f"For example:\n\n  python -m {stage} " in result.stdout


def test_the_script_lists_the_stages() -> None:
    for words in ([], ["--help"]):
        result = python([*WAYS["script"], *words])
        assert result.returncode == 0
        assert all(f"\n  {stage} " in result.stdout for stage in STAGES)
    unknown = python([*WAYS["script"], "decode"])
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "found 'decode', expected one of encode, shards, train, eval" in unknown.stderr


def test_the_script_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["latentbank"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def without_times(text: str) -> str:
    """Returns a text without the last lines of bars, which a slow machine prints."""
    return re.sub(r"^.* in \d+:\d\d:\d\d\n", "", text, flags=re.M)


def test_both_ways_end_alike(tmp_path: Path) -> None:
    """Results, errors of each stage, and work in several processes."""
    column = write_column(tmp_path / "c", moments_spec())
    for code, *words in (
        (0, "shards", "digest", column),
        (0, "shards", "verify", column, "--processes", 2),
        (2, "shards", "info", tmp_path / "nothing"),
        (2, "encode", "run", tmp_path / "nothing.yaml"),
        (2, "encode", "decode"),
        (2, "train", tmp_path / "nothing.yaml"),
        (2, "eval", "report", tmp_path / "nothing"),
    ):
        module, script = (python([*way, *words]) for way in WAYS.values())
        assert module.returncode == script.returncode == code, (words, module.stderr, script.stderr)
        assert module.stdout == script.stdout, words
        assert without_times(module.stderr) == without_times(script.stderr), words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_ends_it_with_its_code(tmp_path: Path, way: str, number: signal.Signals) -> None:
    latents = write_column(tmp_path / "vae", moments_spec())
    text = write_column(tmp_path / "text", tokens_spec())
    words = ["shards", "order", latents, text, "--global-batch", 64, "--steps", 10**9]
    command = [sys.executable, *WAYS[way], *map(str, words)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline()  # it works
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert b"Traceback" not in errors
