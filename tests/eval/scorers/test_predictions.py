"""Findings are kept as they come, survive a stop, and are taken only for the same finder and the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.errors import BadQuestions, BadScores, MissingImages, NotFinite
from eval.images.imageset import ImageSetReader, ImageSetWriter, PictureRef
from eval.images.layouts import Picture
from eval.images.ranks import Rank
from eval.prompts.prompts import Prompt, Prompts
from eval.scorers import predictions as journal
from eval.scorers.predictions import Journal, cached_predictions, count_absent

MADE_BY = {"weights": "abc", "spellings": ("Yes",)}


def make_set(folder: Path, shades: Sequence[int]) -> ImageSetReader:
    prompts = Prompts("p", tuple(Prompt(f"{i:05d}", f"shade {i}") for i in range(len(shades))))
    images = ImageSetWriter(folder, prompts, {"steps": 1})
    for file, shade in zip(images.files, shades, strict=True):
        images.save(file, [np.full((4, 6, 3), shade, np.uint8)])
    images.finish({})
    return ImageSetReader.open(folder)


class Finder:
    """Finds a picture's shade; stops before a block that holds the shade it is told of."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[list[int]] = []
        self._stop = stop

    def __call__(
        self, refs: Sequence[PictureRef], pictures: Sequence[Picture]
    ) -> list[dict[str, Any]]:
        shades = [int(picture[0, 0, 0]) for picture in pictures]
        if self._stop in shades:
            raise KeyboardInterrupt
        self.seen.append(shades)
        return [{"shade": shade, "at": (1, 2)} for shade in shades]


def found_by(
    images: ImageSetReader, *words: Any, **more: Any
) -> list[tuple[PictureRef, dict[str, Any]]]:
    done = cached_predictions(images, "s", *words, **more)
    assert done is not None
    return done.pairs


def shades(actual: list[tuple[PictureRef, dict[str, Any]]]) -> list[int]:
    return [what["shade"] for _, what in actual]


def test_a_stopped_pass_goes_on_with_the_blocks_that_are_left(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10, 20, 30, 40, 50])
    first, second = Finder(stop=30), Finder()
    with pytest.raises(KeyboardInterrupt):
        found_by(images, MADE_BY, 2, first)
    assert first.seen == [[10, 20]]
    actual = found_by(images, MADE_BY, 2, second)
    assert second.seen == [[30, 40], [50]]
    assert shades(actual) == [10, 20, 30, 40, 50]
    assert actual[0][1] == actual[4][1] | {
        "shade": 10
    }  # read or fresh, what is found looks the same
    assert found_by(images, MADE_BY, 2, Finder(stop=10)) == actual


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_line_cut_off_by_a_kill_is_found_again(tmp_path: Path, cut: int) -> None:
    images = make_set(tmp_path, [10, 20, 30])
    whole = found_by(images, MADE_BY, 1, Finder())
    path = Journal(images, "s", MADE_BY).path
    path.write_bytes(path.read_bytes()[:-cut])
    again = Finder()
    assert found_by(images, MADE_BY, 1, again) == whole
    assert [30] in again.seen or cut == 1  # without its end a line is still whole
    assert found_by(images, MADE_BY, 1, Finder(stop=30)) == whole


def test_a_journal_killed_within_its_first_line(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10])
    whole = found_by(images, MADE_BY, 1, Finder())
    path = Journal(images, "s", MADE_BY).path
    path.write_bytes(path.read_bytes()[:20])
    assert found_by(images, MADE_BY, 1, Finder()) == whole


def test_two_processes_that_begin_at_once_keep_each_others_findings(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10, 20])
    first, second = (Journal(images, "s", MADE_BY) for _ in range(2))
    for each, item, shade in zip((first, second), images, (10, 20), strict=True):
        each.add([item], [{"shade": shade}], 1.0)
    again = Journal(images, "s", MADE_BY)
    assert [again[item]["shade"] for item in images] == [10, 20]


def test_a_finding_that_is_no_number_is_named(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10, 20])
    for value in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match=r"00000\.png: found NaN or infinity in what s-"):
            Journal(images, "s", MADE_BY).add(list(images)[:1], [{"yes": value}], 1.0)
    assert not Journal(images, "s", MADE_BY).path.exists()


def test_another_finder_or_another_picture_takes_nothing_over(tmp_path: Path) -> None:
    images = make_set(tmp_path / "a", [10, 20])
    found_by(images, MADE_BY, 1, Finder())
    other = Finder()
    found_by(images, MADE_BY | {"weights": "xyz"}, 1, other)
    assert other.seen == [[10], [20]]
    changed = make_set(tmp_path / "b", [10, 99])
    stale = Journal(images, "s", MADE_BY).path
    target = Journal(changed, "s", MADE_BY).path
    target.parent.mkdir(parents=True)
    target.write_bytes(stale.read_bytes())
    finder = Finder()
    assert shades(found_by(changed, MADE_BY, 1, finder)) == [10, 99]
    assert finder.seen == [[99]]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10])
    path = Journal(images, "s", MADE_BY).path
    path.parent.mkdir(parents=True)
    path.write_text("not ours\nat all\n")
    with pytest.raises(BadScores, match="not the findings of this scorer"):
        found_by(images, MADE_BY, 1, Finder())
    assert path.read_text() == "not ours\nat all\n"


def test_only_wanted_pictures_are_shown(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10, 20])
    finder = Finder()
    actual = found_by(images, MADE_BY, 1, finder, lambda item: item.file.prompt.id == "00001")
    assert (shades(actual), finder.seen) == ([20], [[20]])
    with pytest.raises(MissingImages, match="no picture of a prompt that counts"):
        found_by(images, MADE_BY, 1, finder, lambda item: False)


def test_processes_share_the_blocks_and_the_last_one_has_all(tmp_path: Path) -> None:
    images = make_set(tmp_path, [10, 20, 30, 40, 50])
    item, two = Finder(), Finder()
    assert cached_predictions(images, "s", MADE_BY, 1, item, rank=Rank(0, 2)) is None
    done = cached_predictions(images, "s", MADE_BY, 1, two, rank=Rank(1, 2))
    assert done is not None
    assert shades(done.pairs) == [10, 20, 30, 40, 50]
    assert (item.seen, two.seen) == ([[10], [30], [50]], [[20], [40]])
    assert sorted(
        path.name.count(".") for path in Journal(images, "s", MADE_BY).path.parent.iterdir()
    ) == [1, 2]
    assert shades(found_by(images, MADE_BY, 3, Finder(stop=10))) == [10, 20, 30, 40, 50]


def test_seconds_are_those_of_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one with each look: a block takes a second, three blocks three, now or before."""
    images = make_set(tmp_path, [10, 20, 30, 40, 50])
    ticks = iter(range(1000))
    monkeypatch.setattr(journal.time, "monotonic", lambda: float(next(ticks)))
    with pytest.raises(KeyboardInterrupt):
        cached_predictions(images, "s", MADE_BY, 2, Finder(stop=50))
    done = cached_predictions(images, "s", MADE_BY, 2, Finder())
    assert done is not None
    assert done.seconds == pytest.approx(3)
    again = cached_predictions(images, "s", MADE_BY, 2, Finder(stop=10))
    assert again is not None
    assert again.seconds == done.seconds


def test_the_set_has_the_prompts_that_have_questions() -> None:
    assert count_absent("ab", "ab", partial=False, advice="Do") == 0
    assert count_absent("ab", "a", partial=True, advice="Do") == 1
    with pytest.raises(BadQuestions, match=r"to 1 prompts that the set does not have \(b\)\. Do"):
        count_absent("ab", "a", partial=False, advice="Do")
    for partial in (False, True):
        with pytest.raises(BadQuestions, match=r"1 prompts of the set without a question \(c\)"):
            count_absent("ab", "abc", partial, advice="Do")
