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
from typing import Any

import pytest

from configs.completion import MODULES, parser_of
from configs.latentbank import STAGES
from shards.printing import command
from tests.shards.toy import moments_spec, tokens_spec, write_column

ROOT = Path(__file__).parents[1]
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
    return re.sub(r"^.* in \d+:\d\d:\d\d, .*\n", "", text, flags=re.M)


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


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [["-m", "encode"], ["-m", "shards", "--help"], ["-m", "train", "--help"], ["-m", "eval", "fid", "-h"],
     WAYS["script"], [*WAYS["script"], "encode", "run", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_a_reader_that_has_seen_enough_is_no_error(words: Sequence[str], unbuffered: str) -> None:
    """As `| head -1`, which closes the pipe, here before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True,
            timeout=240, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_pipe_of_something_else_is_an_error() -> None:
    @command
    def sends() -> int:
        raise BrokenPipeError("of a server")

    with pytest.raises(BrokenPipeError, match="of a server"):
        sends()


@pytest.mark.parametrize("way", WAYS)
def test_another_package_called_tests_does_not_hide_the_benchmarks(
    tmp_path: Path, way: str
) -> None:
    """Or it is named: the script looks among the installed packages first."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    paths = {
        "module": {"PYTHONPATH": str(tmp_path)},
        "script": {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"},  # as in bin/
    }
    result = subprocess.run(
        [sys.executable, *WAYS[way], "train", "bench", "--help"], cwd=ROOT, text=True,
        capture_output=True, timeout=240, env={**os.environ, **paths[way]},
    )  # fmt: skip
    if way == "module":
        assert result.returncode == 0, result.stderr
        assert "--light" in result.stdout
    else:
        assert result.returncode == 1
        assert f"`tests` that was loaded is {tmp_path}/tests/__init__.py" in result.stderr


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
        _, errors = child.communicate(timeout=240)
    assert child.returncode == 128 + number
    assert b"Traceback" not in errors


# Completion ----------------------------------------------------------------------------------------


def flags(*words: str) -> set[str]:
    return {name for action in parser_of(words)._actions for name in action.option_strings}


def test_the_stages() -> None:
    assert list(MODULES) == list(STAGES)
    assert [action.choices for action in parser_of([])._actions if action.choices] == [MODULES]
    assert flags("nothing") == {"-h", "--help"}


@pytest.mark.parametrize("stage", MODULES)
def test_each_verb_offers_its_flags(stage: str) -> None:
    """All of them can be put behind the stage and the verb; what they are is known of some."""
    known = {
        ("encode", "init"): "--vae", ("encode", "run"): "--allow-failed", ("shards", "gc"): "--older-than",
        ("shards", "info"): "--json", ("train", "init"): "--held-out", ("train", "export"): "--layout",
        ("eval", "generate"): "--guidance_scale", ("eval", "report"): "--out",
    }  # fmt: skip
    verbs = importlib.import_module(MODULES[stage]).VERBS
    offered = {verb: flags(stage, verb) for verb in verbs}
    for (part, verb), flag in known.items():
        assert part != stage or flag in offered[verb]
        assert part != stage or flag not in flags(stage)


def completed(line: str, folder: Path) -> list[str]:
    """The words that the shell is offered, by argcomplete's own protocol with a shell."""
    answer = folder / "answer"
    env: dict[str, Any] = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, *WAYS["script"]], env=env, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [word.strip() for word in answer.read_text().split("\n")]


@pytest.mark.slow  # a process for each line
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("latentbank ", [*MODULES]),
        ("latentbank en", ["encode"]),
        ("latentbank encode ret", ["retry-failed"]),
        ("latentbank train init --size ", ["tiny", "small", "700m", "1b", "3b"]),
        ("latentbank train init --lat", ["--latents"]),
        ("latentbank train mi", ["mine.yaml"]),
        ("latentbank encode run configs:encode/gem", ["configs:encode/gemma-2b"]),
        ("latentbank train plan configs:train/cp", ["configs:train/cpu"]),
        ("latentbank shards verify --so", ["--source"]),
        ("latentbank eval study ", ["plan", "run", "status", "report"]),
        ("latentbank eval score fid --refe", ["--reference"]),
    ],
)
def test_words_that_may_follow(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert completed(line, tmp_path) == expected
