"""Disks that cannot be written while pictures and pages are made: exit code 2, the path, nothing lost."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.commands import main
from shards import exits
from tests.eval.faults import made, same
from tests.eval.sets import make_items, make_score, make_set
from tests.forks import fork, leave_pytest, wait


def ended(words: list[object], log: Path, limit: int | None = None) -> tuple[int, str]:
    """Exit code and output of `python -m eval WORDS`, with files of at most `limit` bytes."""

    def work() -> None:
        leave_pytest()
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        exits.run(lambda: main([str(word) for word in words]))

    return wait(fork(work, log)), log.read_text()


def generate(folder: Path, save_dir: Path) -> list[object]:
    words = ["--num_inference_steps", 2, "--batch_size", 4, "--device", "cpu"]
    paths = ["--checkpoint", folder / "run", "--prompts", folder / "words.json"]
    return ["generate", *paths, "--save_dir", save_dir, *words]


def test_a_disk_that_fills_up_while_pictures_are_made(tmp_path: Path) -> None:
    """The log is a file as well, and has its room."""
    folder, _ = made()
    out = tmp_path / "out"
    code, output = ended(generate(folder, out), tmp_path / "log", 3000)
    assert code == 2, output
    assert "File too large: " in output
    assert f"{out}" in output
    assert "ulimit -f" in output
    assert "Traceback" not in output
    code, output = ended(generate(folder, out), tmp_path / "again")
    assert code == 0, output
    same(out)


def report_words(folder: Path, out: Path) -> list[object]:
    return ["report", folder / "a", folder / "b", "--out", out]


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    for name, level in (("a", 0.2), ("b", 0.4)):
        make_set(tmp_path / name)
        make_score(tmp_path / name, "toy", make_items([level] * 30))
    return tmp_path


def test_a_page_on_a_disk_that_is_full(sets: Path) -> None:
    out = sets / "report.html"
    out.write_text("the last one")
    code, output = ended(report_words(sets, out), sets / "log", 1000)
    assert code == 2, output
    assert "report.json" in output
    assert "ulimit -f" in output
    assert "Traceback" not in output
    assert out.read_text() == "the last one"
    assert not list(sets.glob(".tmp-*"))


@pytest.mark.parametrize("words", ["generate", "report"])
def test_a_file_where_a_folder_is_needed(sets: Path, words: str) -> None:
    folder, _ = made()
    (sets / "file").write_text("mine")
    lines: dict[str, Callable[[], list[object]]] = {
        "generate": lambda: generate(folder, sets / "file/out"),
        "report": lambda: report_words(sets, sets / "file/report.html"),
    }
    code, output = ended(lines[words](), sets / "log")
    assert code == 2, output
    assert str(sets / "file") in output
    assert "Traceback" not in output
    assert (sets / "file").read_text() == "mine"
