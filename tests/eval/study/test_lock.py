"""study.lock: what it holds, and every kind of change that `study verify` finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.commands import main
from eval.errors import BadStudy
from eval.prompts.benchmarks import find
from eval.study.lock import FILE, code_digest, record_of, verify, versions, write_lock
from eval.study.run.files import write_configs
from eval.study.study import Study
from shards import CorruptColumn, seal, sha256_file
from tests.eval.study.handmade import PRIMARY, fill, open_study
from tests.eval.study.page.test_panel import make_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study with columns, pictures and scores; its trainings are gone."""
    study = make_study(tmp_path)
    write_lock(study)
    return study


def test_what_a_lock_holds(study: Study) -> None:
    record = record_of(study)
    assert versions()["torch"] == record["versions"]["torch"]
    assert record["code"] == code_digest()
    assert [*record["configs"]] == [f"configs/{entry}.yaml" for entry in study.entries]
    assert set(record["columns"]) == {
        str(study.path.parent / "cache/pets" / name)
        for name in ("flux", "flux-e2e", "other", "words")
    }
    score = study.set_folder("flux", 0, 100) / f"scores/{PRIMARY}.json"
    assert record["outputs"][
        f"images/flux-seed0/step-00000100/scores/{PRIMARY}.json"
    ] == sha256_file(score)
    assert any(
        command[:4] == ["python", "-m", "train", "OUT/configs/flux.yaml"]
        for command in record["commands"].values()
    )
    before = (study.out / FILE).read_bytes()
    write_lock(study)
    assert (study.out / FILE).read_bytes() == before  # it holds no times
    assert verify(study) == ([], [])


def change_score(study: Study) -> None:
    path = study.set_folder("flux", 1, 100) / f"scores/{PRIMARY}.json"
    path.write_text(path.read_text().replace('"value"', ' "value"', 1))


def change_picture(study: Study) -> None:
    folder = study.set_folder("e2e", 0, 100) / "images"
    first, second = sorted(folder.iterdir())[:2]
    shutil.copy(first, second)


def remove_items(study: Study) -> None:
    next((study.set_folder("e2e", 2, 100) / "scores").glob("*.items.jsonl")).unlink()


def remove_column(study: Study) -> None:
    shutil.rmtree(study.path.parent / "cache/pets/other")


def change_study_file(study: Study) -> None:
    (study.out / "study.yaml").write_text("seeds: [7]\n")


def add_score(study: Study) -> None:
    folder = study.set_folder("flux", 0, 100) / "scores"
    shutil.copy(folder / f"{PRIMARY}.json", folder / "another.json")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (change_score, f"outputs: images/flux-seed1/step-00000100/scores/{PRIMARY}.json: changed"),
        (change_picture, "outputs: images/e2e-seed0/step-00000100: missing"),
        (remove_items, "items.jsonl: missing"),
        (remove_column, "cache/pets/other: missing"),
        (add_score, "scores/another.json: not in the lock"),
        (change_study_file, "outputs: study.yaml: "),
    ],
)
def test_changes_are_found(
    change: Callable[[Study], None], line: str, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    change(study)
    faults, _ = verify(study)
    assert len(faults) == 1
    assert line in faults[0]
    assert main(["study", "verify", str(study.path), "--out", str(study.out)]) == 1
    assert "1 difference from the lock" in capsys.readouterr().out


def test_prompts_that_were_changed_are_found(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"a": "a horse", "b": "two horses"}')
    study = fill(open_study(tmp_path, prompts=str(path)), (0.0, 0.5))
    write_lock(study)
    assert record_of(study)["prompts"] == {str(path): find("prompts", path).digest}
    assert verify(study) == ([], [])
    path.write_text('{"a": "a horse", "b": "three horses"}')
    assert verify(study)[0] == [f"prompts: {path}: changed"]
    path.unlink()
    assert verify(study)[0] == [f"prompts: {path}: missing"]


def test_a_training_config_that_was_changed_is_found(tmp_path: Path) -> None:
    """The file that the YAML names, which no digest of the YAML holds; and what the trainer wrote into a run."""
    study = fill(open_study(tmp_path), (0.0, 0.5))
    write_configs(study)
    run = study.run_folder("e2e", 1) / "config.yaml"
    run.parent.mkdir(parents=True)
    run.write_text("seed: 1\n")
    write_lock(study)
    assert verify(study) == ([], [])
    run.write_text("seed: 2\n")
    edited = study.out / "configs/flux.yaml"
    edited.write_text(edited.read_text().replace("steps: 100", "steps: 101", 1))
    faults, _ = verify(study)
    assert faults == [
        "outputs: configs/flux.yaml: changed",
        f"outputs: {run.relative_to(study.out)}: changed",
    ]
    train = study.config.train
    train.write_text(train.read_text() + "\nlog_every: 7\n")
    faults, _ = verify(Study.open(study.path, study.out))
    assert faults[:2] == [
        "configs: configs/e2e.yaml: changed",
        "configs: configs/flux.yaml: changed",
    ]


def test_a_moved_folder_is_the_same_study(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5))
    write_configs(study)
    write_lock(study)
    before = (study.out / FILE).read_bytes()
    shutil.move(study.out, tmp_path / "moved")
    moved = Study.open(shutil.copy(study.path, tmp_path / "same.yaml"), tmp_path / "moved")
    assert verify(moved) == ([], [])
    write_configs(moved)
    write_lock(moved)
    assert (moved.out / FILE).read_bytes() == before
    shutil.rmtree(moved.set_folder("e2e", 1, 100))
    faults, _ = verify(moved)
    assert faults[0] == "outputs: images/e2e-seed1/step-00000100: missing"


@pytest.mark.parametrize("out", ["m", ".", "prompts"])
def test_a_folder_whose_name_is_in_other_words_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """As `prompts` is in prompts.txt. It may be moved all the same."""
    path = open_study(tmp_path).path
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    study = fill(Study.open(path, Path(out)), (0.0, 0.5))
    write_configs(study)
    write_lock(study)
    assert verify(study) == ([], [])
    command = record_of(study)["commands"]["generate/flux/seed0/step-00000100"]
    assert command[:4] == ["python", "-m", "eval", "generate"]
    assert "prompts.txt" in command
    shutil.copytree(out, tmp_path / "moved")
    assert verify(Study.open(path, tmp_path / "moved")) == ([], [])


def test_other_numbers_of_processes_are_the_same_study(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--jobs`, or a machine with more GPUs, gives a training."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    wider = Study.open(study.path, study.out)
    assert "torchrun" in record_of(wider)["commands"]["train/flux/seed0"]
    assert verify(wider) == ([], [])


def test_other_versions_are_said_and_no_fault(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study.out / FILE
    record = json.loads(path.read_text())
    del record["digest"]
    record["versions"]["torch"] = "1.0"
    path.write_bytes(seal(record))
    assert main(["study", "verify", str(study.path), "--out", str(study.out)]) == 0
    assert "another version: torch: found '1.0'" in capsys.readouterr().out


def test_another_version_of_the_code_is_said_and_no_fault(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_digest()
    monkeypatch.setattr("eval.study.lock.code_digest", lambda: "0" * 64)
    faults, others = verify(study)
    assert faults == []
    assert others == [f"code: found '{before}', expected '{'0' * 64}'"]


def test_a_lock_of_another_release_is_written_anew_by_a_run(study: Study) -> None:
    path = study.out / FILE
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_bytes(seal(record | {"version": 1}))
    with pytest.raises(
        BadStudy, match=r"found format .* version 1.*`python -m eval study run`, which"
    ):
        verify(study)


def test_no_lock_another_study_and_a_damaged_lock(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study.out / FILE
    other = Study.open(study.path, study.out)
    text = study.path.read_text()
    study.path.write_text(text + "note: another\n")
    another = Study.open(study.path, study.out)
    with monkeypatch.context() as patch:  # it is said before files are read
        patch.setattr("eval.study.lock.record_of", lambda _: pytest.fail("files were read"))
        with pytest.raises(BadStudy, match=r"is of another study.*\n.*note"):
            verify(another)
    study.path.write_text(text)
    path.write_bytes(path.read_bytes().replace(b'"columns"', b'"colunms"', 1))
    with pytest.raises(CorruptColumn):
        verify(other)
    path.unlink()
    with pytest.raises(BadStudy, match="`python -m eval study run` writes it"):
        verify(other)
