"""A version that is not known is no damage: exit code 2, and no byte of the folder changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from eval.commands import main
from eval.images import runs
from eval.images.imageset import ImageSetWriter
from eval.images.prompt_cache import TextCache
from eval.report.report import report
from eval.score import run as score_sets
from eval.scorers.predictions import Journal
from eval.scores.scorer import Scorer
from shards import FormatVersion, put_if_absent, seal
from shards.__main__ import main as shards_main
from tests.eval.sets import PROMPTS, SETTINGS, make_items, make_score, make_set, training
from tests.shards.toy import small_moments
from tests.train import saves
from train.checkpoints import checkpoint

Act = Callable[[Path], Any]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bump(path: Path) -> None:
    """The record's version and one, with a digest that fits where it has one."""
    head, *rest = path.read_bytes().split(b"\n")
    record = json.loads(b"\n".join([head, *rest]) if path.suffix == ".json" else head)
    record["version"] += 1
    sealed = record.pop("digest", None) is not None
    data = seal(record) if sealed else json.dumps(record, sort_keys=True).encode()
    path.write_bytes(data if path.suffix == ".json" else data + b"\n" + b"\n".join(rest))


def refused(folder: Path, act: Act) -> None:
    before = tree(folder)
    with pytest.raises(FormatVersion, match="version 2|version 3") as caught:
        act(folder)
    assert type(caught.value).exit_code == 2
    assert tree(folder) == before


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("act", [checkpoint.pins, checkpoint.load_for_sampling])
def test_a_run_with_a_checkpoint_of_a_newer_release(tmp_path: Path, which: int, act: Act) -> None:
    """Also an older step of it: this release would take it away in the end."""
    saves.save(tmp_path, 1)
    saves.save(tmp_path, 2)
    bump(tmp_path / f"step-0000000{which}" / "manifest.json")
    if act is checkpoint.load_for_sampling and which == 1:
        assert act(tmp_path)[1]["step"] == 2
    else:
        refused(tmp_path, act)


def test_a_version_that_was_written_by_hand_is_not_passed_over(tmp_path: Path) -> None:
    saves.save(tmp_path, 1)
    manifest = saves.save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version":1', '"version":2'))
    refused(tmp_path, checkpoint.newest)


# Pictures and scores -------------------------------------------------------------------------------------------------


def again(folder: Path) -> None:
    ImageSetWriter(folder, PROMPTS, SETTINGS)


def score(folder: Path) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it looked at the pictures")

    main_args = type("Args", (), {"save_dir": [folder], "partial": False})
    score_sets(Scorer(lambda add: None, never), main_args)  # type: ignore[arg-type]


def on_a_page(folder: Path) -> None:
    report([folder], folder / "report.html")


def add_report(folder: Path) -> Path:
    on_a_page(folder)
    return folder / "report.json"


def add_texts(folder: Path) -> Path:
    cache = texts(folder)
    put_if_absent(cache.folder / "text.json", json.dumps(cache._record).encode())
    return cache.folder / "text.json"


def texts(folder: Path) -> TextCache:
    return TextCache(folder / "text", {"weights": "1"}, ["a"], "cpu")


def add_findings(folder: Path) -> Path:
    journal = findings(folder)
    item = next(iter(results_images(folder)))
    journal.add([item], [{"yes": 1}], 0.5)
    return journal.path


def results_images(folder: Path) -> Any:
    from eval.images.imageset import ImageSetReader

    return ImageSetReader.open(folder)


def findings(folder: Path) -> Journal:
    return Journal(results_images(folder), "judge", {"weights": "1"})


@pytest.mark.parametrize(
    ("record", "acts"),
    [
        (lambda folder: folder / "manifest.json", (again, score, on_a_page)),
        (lambda folder: folder / "scores/toy.json", (score, on_a_page)),
        (add_report, (on_a_page,)),
        (add_texts, (texts,)),
        (add_findings, (findings,)),
    ],
    ids=["manifest", "score", "report", "text", "findings"],
)
def test_a_set_of_a_newer_release(
    tmp_path: Path, record: Callable[[Path], Path], acts: tuple[Act, ...]
) -> None:
    folder = make_set(tmp_path / "set")
    make_score(folder, "toy", make_items([0.5] * 30))
    path = record(folder)
    bump(path)
    for act in acts:
        refused(folder, act)


def test_a_record_of_a_training_of_a_newer_release(tmp_path: Path) -> None:
    """Neither a report nor what goes on with the set passes it over."""
    folder = make_set(tmp_path / "set", trained=training())
    bump(folder / runs.NAME)
    refused(folder, lambda folder: report([folder], tmp_path / "r.html"))
    refused(folder, lambda folder: runs.put(folder, runs.Run(SETTINGS["weights"], training())))


def test_a_reference_of_a_newer_release(tmp_path: Path) -> None:
    import numpy as np

    from eval.distances.references import Reference, read, write

    path = tmp_path / "r.safetensors"
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    write(Reference("r", {"count": 5}, features, (None,) * 5), path)
    with safe_open(path, "numpy") as file:
        record = json.loads(file.metadata()["record"])
    record["version"] += 1
    save_file(load_file(path), path, {"record": json.dumps(record)})
    refused(tmp_path, lambda folder: read(path))


# Columns -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def column(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_moments(tmp_path_factory.mktemp("columns") / "column")


@pytest.mark.parametrize("record", ["column.json", "commits/00000.json", "complete/*.json"])
@pytest.mark.parametrize(
    "words",
    [["verify"], ["repair", "--yes"], ["gc", "--yes", "--older-than", "0s", "--generations"]],
)
def test_a_column_of_a_newer_release(
    tmp_path: Path, column: Path, record: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "column"
    shutil.copytree(column, folder)
    bump(next(folder.glob(record)))
    before = tree(folder)
    monkeypatch.setattr("sys.argv", ["shards", words[0], str(folder), *words[1:]])
    assert shards_main() == 2
    assert tree(folder) == before


def test_the_commands_end_with_2(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    bump(folder / "manifest.json")
    with pytest.raises(FormatVersion):
        main(["report", str(folder), "--out", str(tmp_path / "r.html")])
