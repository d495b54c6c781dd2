"""`study gc`: what it removes, what it leaves alone, and that a study is as before without its pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from eval.commands import main
from eval.errors import BadStudy, MissingImages, OutputEdited, StudyRunning
from eval.images.checks import REMOVED
from eval.images.imageset import ImageSetReader
from eval.study.earlier import take_over, taken_over
from eval.study.graph import nodes_of
from eval.study.lock import verify
from eval.study.plan.cost import Assumptions
from eval.study.plan.plan import plan_existing
from eval.study.report.page import report
from eval.study.run import gc
from eval.study.run.gc import Removal, removals, remove
from eval.study.run.workers import alone
from eval.study.status import states
from eval.study.study import Study
from tests.eval.study.small_study import ROOT, environment, study, study_yaml

pytestmark = pytest.mark.timeout(900)  # the study that is copied is a dozen processes
SHOWN = 2  # of six prompts


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Study:
    """A copy of a finished study, whose page shows some of its prompts."""
    shutil.copytree(made / "out", tmp_path / "out")
    study = Study.open(study_yaml(made, "collected"), tmp_path / "out")
    report(study, SHOWN)
    return study


def sets(study: Study) -> list[Path]:
    return [study.set_folder(entry, 0, 6) for entry in study.entries]


def pictures(study: Study) -> list[str]:
    """The pictures of all sets, by their paths below the study's folder."""
    return sorted(str(path.relative_to(study.out)) for path in study.out.rglob("*.png"))


def run_gc(study: Study, *words: str) -> int | None:
    return main(["study", "gc", str(study.path), "--out", str(study.out), *words])


def test_what_the_page_shows_is_left_and_the_study_is_as_before(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    before, data = pictures(finished), report(finished, SHOWN)
    digests = [ImageSetReader.open(folder).digest for folder in sets(finished)]
    assert not run_gc(finished)
    text = capsys.readouterr().out
    assert f"would delete: {sets(finished)[0]}: 4 of 6 files (" in text
    assert "to be deleted; do it with --yes" in text
    assert pictures(finished) == before
    size = sum((finished.out / name).stat().st_size for name in before)
    assert not run_gc(finished, "--yes")
    left = pictures(finished)
    assert {Path(name).stem for name in left} == set(data["shown"])
    assert len(left) == 2 * SHOWN
    assert sum((finished.out / name).stat().st_size for name in left) < size
    capsys.readouterr()

    assert all(states(finished).values())
    lock = (finished.out / "study.lock").read_bytes()
    again = study("run", finished.path, "--out", finished.out)
    assert again.returncode == 0, again.stderr
    assert "to do: nothing" in again.stdout + again.stderr
    assert "begins" not in again.stdout + again.stderr
    assert (finished.out / "study.lock").read_bytes() == lock
    assert [cost for cost in plan_existing(finished, Assumptions()).to_make()] == []
    assert verify(finished) == ([], [])
    assert main(["study", "verify", str(finished.path), "--out", str(finished.out)]) == 0
    assert "pictures of 2 sets were removed by `study gc`" in capsys.readouterr().out
    assert [ImageSetReader.open(folder, scored=True).digest for folder in sets(finished)] == digests
    page = report(finished)  # 24 prompts are asked for
    notes = [note["note"] for entry in page["entries"] for note in entry.pop("notes")]
    assert notes == 2 * ["4 files of pictures were removed once they were scored, and 2 are left"]
    for entry in data["entries"]:
        assert entry.pop("notes") == []
    assert page == data
    assert not run_gc(finished, "--yes")
    assert "pictures of 0 sets, 0 bytes deleted" in capsys.readouterr().out
    assert pictures(finished) == left


def test_another_score_has_the_pictures_made_again(made: Path, finished: Study) -> None:
    before = pictures(finished)
    assert not run_gc(finished, "--yes")
    with pytest.raises(MissingImages, match="4 pictures were removed by `python -m eval study gc`"):
        ImageSetReader.open(sets(finished)[0])
    scorers = ["demo-acc", {"demo-fd": {"reference": str(made), "allow-few": True}}]
    larger = Study.open(study_yaml(made, "larger", scorers=scorers), finished.out)
    done = states(larger)
    assert done["train/plain/seed0"]
    assert not done["generate/plain/seed0/step-00000006"]
    (node,) = (n for n in nodes_of(finished) if n.id == "generate/plain/seed0/step-00000006")
    command = [sys.executable, *node.command[1:]]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    assert not (sets(finished)[0] / REMOVED).exists()
    assert ImageSetReader.open(sets(finished)[0]).missing == 0
    plain = [name for name in before if "plain" in name]
    assert [name for name in pictures(finished) if "plain" in name] == plain
    assert states(larger)["generate/plain/seed0/step-00000006"]


def lose_shown(folder: Path) -> None:
    """A picture that was left."""
    next((folder / "images").glob("*.png")).unlink()


def damage_record(folder: Path) -> None:
    path = folder / REMOVED
    path.write_bytes(path.read_bytes().replace(b'"kept"', b'"kepd"'))


def take_record_of_another(folder: Path) -> None:
    shutil.copy(folder.parents[1] / f"other-seed0/step-00000006/{REMOVED}", folder)


def delete_record(folder: Path) -> None:
    (folder / REMOVED).unlink()


@pytest.mark.parametrize(
    "fault", [lose_shown, damage_record, take_record_of_another, delete_record]
)
def test_what_is_missing_beyond_what_was_removed_is_a_fault(
    finished: Study, fault: Callable[[Path], None]
) -> None:
    assert not run_gc(finished, "--yes")
    fault(sets(finished)[0])
    assert not states(finished)["generate/plain/seed0/step-00000006"]
    faults, _ = verify(finished)
    assert "outputs: images/plain-seed0/step-00000006: missing" in faults


# Left alone ---------------------------------------------------------------------------------------


def no_page(study: Study) -> None:
    (study.out / "study.json").unlink()


def no_items(study: Study) -> None:
    for path in (sets(study)[0] / "scores").glob("*.items.jsonl"):
        path.unlink()


def edited_score(study: Study) -> None:
    (path,) = (sets(study)[0] / "scores").glob("demo-acc-*.json")
    path.write_text(path.read_text().replace('"value"', ' "value"', 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_page, "study.json: no such file. Run `python -m eval study report` first"),
        (no_items, r"1 command of .* are still to be run \(score/demo-acc/plain/seed0"),
        (edited_score, "files that this study made were changed since"),
    ],
)
def test_refused(finished: Study, change: Callable[[Study], None], message: str) -> None:
    change(finished)
    before = pictures(finished)
    with pytest.raises((BadStudy, OutputEdited), match=message):
        removals(finished)
    with pytest.raises(SystemExit) as ended:
        exits_of(finished)
    assert ended.value.code == 2
    assert pictures(finished) == before


def exits_of(study: Study) -> None:
    from shards import exits

    exits.run(lambda: run_gc(study, "--yes"))


def test_not_while_the_study_runs(finished: Study) -> None:
    before = pictures(finished)
    with alone(finished), pytest.raises(StudyRunning):
        run_gc(finished, "--yes")
    assert pictures(finished) == before


def edited_picture(folder: Path) -> None:
    first, second = sorted((folder / "images").glob("*.png"))[:2]
    shutil.copy(first, second)


def strange_picture(folder: Path) -> None:
    first = next((folder / "images").glob("*.png"))
    shutil.copy(first, first.with_name("of-somebody.png"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edited_picture, "1 pictures changed since manifest.json was written"),
        (strange_picture, "found 1 files that no prompt asks for"),
    ],
)
def test_a_set_that_is_not_what_was_scored_is_left_alone(
    finished: Study,
    change: Callable[[Path], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(sets(finished)[0])
    before = [name for name in pictures(finished) if "plain" in name]
    assert not run_gc(finished, "--yes")
    text = capsys.readouterr().out
    assert f"left alone: {sets(finished)[0]}: " in text
    assert reason in text
    assert "pictures of 1 set," in text
    assert [name for name in pictures(finished) if "plain" in name] == before


def test_sets_of_other_folders_are_left_alone(
    finished: Study, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken over, or behind a link; and a set whose pictures are gone is not taken over."""
    before = pictures(finished)
    folders = [str(finished.out / name) for name in ("runs", "images")]
    config = study_yaml(made, "by-hand", reuse=folders)
    second = Study.open(config, tmp_path / "second")
    shutil.copytree(finished.out / "logs/score", second.out / "logs/score")
    shutil.copy(finished.out / "study.json", second.out)
    assert len(taken_over(take_over(second))) == 4
    assert not run_gc(second, "--yes")
    text = capsys.readouterr().out
    assert text.count("it is not in the study's folder") == 2
    assert pictures(finished) == before

    linked = sets(finished)[0]
    shutil.move(linked, tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert not run_gc(finished, "--yes")
    assert len(list((tmp_path / "elsewhere/images").glob("*.png"))) == 6
    linked.unlink()
    shutil.move(tmp_path / "elsewhere", linked)
    assert not run_gc(finished, "--yes")
    assert [name for name in taken_over(take_over(second)) if name.startswith("generate")] == []


# Killed -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_call_it_goes_on(
    finished: Study, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study is whole and verified at every moment; the next call ends as one that was not killed."""
    whole = finished.out.with_name("whole")
    shutil.copytree(finished.out, whole)
    planned, _ = removals(finished)
    calls = sum(1 + len(removal.files) for removal in planned)
    assert calls == 2 * (1 + 4)
    for moment in range(calls):
        shutil.rmtree(finished.out)
        shutil.copytree(whole, finished.out)
        with monkeypatch.context() as patch:
            ends_at(moment, after, patch)
            with pytest.raises(Killed):
                remove_all(planned)
        assert all(states(finished).values())
        assert verify(finished) == ([], [])
        remove_all(removals(finished)[0])
        assert len(pictures(finished)) == 2 * SHOWN
        assert all(states(finished).values())


def remove_all(planned: Iterable[Removal]) -> None:
    for removal in planned:
        remove(removal)


def ends_at(moment: int, after: bool, patch: pytest.MonkeyPatch) -> None:
    """Raises Killed before or after a call that changes the disk, by its number."""
    count = 0

    def ending(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            if number == moment and not after:
                raise Killed
            result = call(*args, **kwargs)
            if number == moment:
                raise Killed
            return result

        return wrapped

    patch.setattr(gc, "atomic_write", ending(gc.atomic_write))
    patch.setattr(Path, "unlink", ending(Path.unlink))


def test_pages_of_another_time(finished: Study) -> None:
    """A page that shows no picture leaves none; a file that is no page is refused."""
    report(finished, 0)
    (first, second), _ = removals(finished)
    assert (len(first.files), first.kept, len(second.files)) == (6, (), 6)
    path = finished.out / "study.json"
    path.write_text(json.dumps({"shown": [1]}))
    with pytest.raises(BadStudy, match="names no prompts that are shown"):
        removals(finished)
    path.write_text("not json")
    with pytest.raises(BadStudy, match="not the numbers of a study"):
        removals(finished)
