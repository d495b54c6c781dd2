"""DPG-Bench's questions as they are read, and gates worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.errors import BadQuestions
from eval.prompts.prompts import Prompt, Prompts
from eval.scorers import dpg
from eval.scorers.dpg import Question, gated, parents_first, read_questions

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)


def row(item: str, number: object, parents: str, category: str, question: str = "Is it?") -> str:
    return f'{item},"a text, with a comma",,{number},"{parents}",x,y,{category} (panda),{question}'


def written(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "dpg_bench.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def q(number: int, *parents: int, category: str = "entity - whole") -> Question:
    return Question(number, parents, f"{number}?", category)


def official(questions: list[Question], answers: dict[int, bool]) -> float:
    """The official walk: in the file's order, over scores that are changed in place."""
    scores = {question.number: float(answers[question.number]) for question in questions}
    for question in questions:
        if any(scores[parent] == 0 for parent in question.parents):
            scores[question.number] = 0.0
    return sum(scores.values()) / len(scores)


def ours(questions: list[Question], answers: dict[int, bool]) -> float:
    return sum(gated(parents_first(questions), answers).values()) / len(questions)


def test_the_golden_case() -> None:
    """q1 no, q2 and q3 yes, each about the one before: nothing counts, whatever the order of the file."""
    answers = {1: False, 2: True, 3: True}
    ordered = [q(1), q(2, 1), q(3, 2)]
    early = [q(1), q(3, 2), q(2, 1)]
    assert official(ordered, answers) == 0
    assert official(early, answers) == pytest.approx(
        1 / 3
    )  # q3 was walked over while q2 was still yes
    assert ours(ordered, answers) == ours(early, answers) == 0


@pytest.mark.parametrize(
    ("questions", "no", "counts"),
    [
        ([q(1), q(2), q(3)], {2}, {1, 3}),
        ([q(1), q(2, 1), q(3, 1)], {1}, set()),
        ([q(1), q(2, 1), q(3, 1)], {2}, {1, 3}),
        ([q(1), q(2), q(3, 1, 2), q(4, 3)], {2}, {1}),  # all parents must be there
        ([q(1), q(2), q(3, 1, 2), q(4, 3)], set(), {1, 2, 3, 4}),
        ([q(4, 3), q(3, 2), q(2, 1), q(1)], {1}, set()),
    ],
)
def test_gates(questions: list[Question], no: set[int], counts: set[int]) -> None:
    answers = {question.number: question.number not in no for question in questions}
    actual = gated(parents_first(questions), answers)
    assert {number for number, count in actual.items() if count} == counts


def test_questions_are_read_as_they_stand(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        row("007", 2, "1", "attribute - color", "Is the panda red?"),
        row("007", 1, "0", "entity - whole"),
        row("007", 3, "1, 2", "relation - spatial"),
        row("partiprompts97", 1, "0", "global"),
    )
    actual = read_questions(path)
    assert list(actual) == ["007", "partiprompts97"]  # an id is text: its zeros stay
    assert [(single.number, single.parents) for single in actual["007"]] == [
        (1, ()),
        (2, (1,)),
        (3, (1, 2)),
    ]
    panda = actual["007"][1]
    assert (panda.text, panda.category) == ("Is the panda red?", "attribute - color")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        ([row("a", "x", "0", "entity")], "expected an id, a whole number"),
        ([row("a", 1, "x", "entity")], "expected an id, a whole number"),
        ([row("", 1, "0", "entity")], "an empty field"),
        ([row("a", 1, "0", "entity", "")], "an empty field"),
        (["a,b"], "expected an id, a whole number"),
        ([row("a", 1, "2", "entity"), row("a", 2, "1", "entity")], "depend on each other"),
        ([row("a", 1, "1", "entity")], "depend on each other"),
    ],
)
def test_damaged_questions_are_named(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(BadQuestions, match=message):
        read_questions(written(tmp_path, *rows))


def test_doubled_rows_and_lost_parents_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(
        tmp_path,
        row("a", 1, "0", "entity", "Is it old?"),
        row("a", 2, "1, 7, 9", "entity"),
        row("a", 1, "0", "entity", "Is it new?"),
        row("b", 1, "2", "global"),
        row("c", 1, "0", "global"),
        row("c", 1, "0", "global"),
    )
    actual = read_questions(path)
    assert [(single.number, single.parents) for single in actual["a"]] == [(1, ()), (2, (1,))]
    assert actual["a"][0].text == "Is it new?"
    assert actual["b"][0].parents == ()
    assert len(actual["c"]) == 1
    doubled, lost = (record.getMessage() for record in caplog.records)
    assert "2 rows are of a proposition that has another row" in doubled
    assert "3 parents are no propositions of their prompt" in lost


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadQuestions, match=r"none\.csv: no such file.*prompts fetch dpgbench.*--csv"
    ):
        read_questions(tmp_path / "none.csv")
    with pytest.raises(BadQuestions, match="expected also proposition_id, dependency, tuple"):
        read_questions(written(tmp_path, "a", header="item_id,text"))
    (tmp_path / "binary.csv").write_bytes(b"item_id\n\xff\xfe")
    with pytest.raises(BadQuestions, match="not CSV in UTF-8"):
        read_questions(tmp_path / "binary.csv")


def prompts(*ids: str) -> Prompts:
    return Prompts("dpgbench", tuple(Prompt(name, "x") for name in ids))


def test_a_tile_from_probabilities() -> None:
    questions = parents_first([q(1), q(2, 1, category="attribute - color"), q(3)])
    item = dpg.item("a", 2, questions, {"1": [0.3, 0.3], "2": [0.6, 0.1], "3": [0.02, 0.01]})
    assert (item.prompt, item.number) == ("a", 2)
    answers = {
        single["proposition"]: (single["answer"], single["gated"])
        for single in item.found["questions"]
    }
    assert answers == {
        1: (False, False),
        2: (True, False),
        3: (True, True),
    }  # as likely as no is no
    assert (item.value, dpg.ungated(item).value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    answers = {
        name: [single.value for single in some]
        for name, some in dpg.by_category([item], "answer").items()
    }
    assert answers == {
        "attribute": [1.0],
        "entity": [0.0, 1.0],
        "attribute - color": [1.0],
        "entity - whole": [0.0, 1.0],
    }
    counts = {
        name: [single.value for single in some]
        for name, some in dpg.by_category([item], "gated").items()
    }
    assert counts["attribute"] == [0.0]
