"""The benchmarks' prompt files, official and the reference's, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.errors import BadPrompts
from eval.images.layouts import LAYOUTS
from eval.prompts.benchmarks import BENCHMARKS, find
from eval.prompts.prompts import Prompt

BENCH = {
    "tag": "single_object",
    "include": [{"class": "bench", "count": 1}],
    "prompt": "a photo of a bench",
}
CLOCKS = {
    "tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}  # fmt: skip
RATINGS = {
    "id": "1",
    "prompt": "a baker",
    "prompt in Chinese": "面包师",
    "models": {"SDXL_Base": [1, 2, 5]},
}
LONG = ("große Katze 🐈 " * 700).strip()  # 10,000 characters


def write(folder: Path, text: str | bytes | dict[str, str]) -> Path:
    """A file, or a folder of files."""
    path = folder / "prompts"
    if isinstance(text, dict):
        path.mkdir()
        for name, inner in text.items():
            (path / name).write_text(inner, encoding="utf-8")
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("benchmark", "text", "expected"),
    [
        (
            "geneval", f"{json.dumps(BENCH)}\n{json.dumps(CLOCKS)}\n",
            [
                Prompt("00000", "a photo of a bench", "single_object", BENCH),
                Prompt("00001", "a photo of two clocks", "counting", CLOCKS),
            ],
        ),
        ("geneval", json.dumps(BENCH), [Prompt("00000", "a photo of a bench", "single_object", BENCH)]),
        ("dpgbench", {"10.txt": "ten\n", "0.txt": LONG, "x.csv": "no"}, [Prompt("0", LONG), Prompt("10", "ten")]),
        ("dpgbench", json.dumps({"b1": "one", "a2": LONG}), [Prompt("b1", "one"), Prompt("a2", LONG)]),
        ("dpgbench", '["one", "two"]', [Prompt("prompt_00000", "one"), Prompt("prompt_00001", "two")]),
        ("genaibench", json.dumps({"00001": RATINGS}), [Prompt("00001", "a baker")]),
        ("genaibench", '{"00007": "a baker"}', [Prompt("00007", "a baker")]),
        ("genaibench", '["a baker", "a gardener"]', [Prompt("00000", "a baker"), Prompt("00001", "a gardener")]),
        ("genaibench527", json.dumps({"00001": RATINGS}), [Prompt("00001", "a baker")]),
        ("mjhq30k", '{"0a": {"category": "food", "prompt": "soup"}}', [Prompt("0a", "soup", "food")]),
        ("mjhq30k", '["soup"]', [Prompt("00000", "soup")]),
        (
            "coco30k", 'id,image_id,caption\r\n37,203564,"A bicycle, with a clock."\r\n',
            [Prompt("37", "A bicycle, with a clock.", record={"image_id": 203564})],
        ),
        (
            "coco30k", '\ufeff[{"image_id": 5, "id": 8, "caption": "A cat"}]',
            [Prompt("8", "A cat", record={"image_id": 5})],
        ),
        ("coco30k", '["A cat", "A dog"]', [Prompt("00000", "A cat"), Prompt("00001", "A dog")]),
    ],
)  # fmt: skip
def test_forms(
    tmp_path: Path, benchmark: str, text: str | dict[str, str], expected: list[Prompt]
) -> None:
    prompts = find(benchmark, write(tmp_path, text))
    assert prompts.benchmark == benchmark
    assert list(prompts.items) == expected


@pytest.mark.parametrize(
    ("benchmark", "text", "message"),
    [
        ("geneval", "", "holds no prompt"),
        ("geneval", "[]", "found a list of prompts, expected for geneval records"),
        ("geneval", '{"0": "x"}', "found {id: prompt}, expected for geneval records"),
        ("geneval", "a photo of a bench\n", "found lines of text"),
        ("geneval", f"{json.dumps(BENCH)}\n{{", "line 2 is not valid JSON"),
        (
            "geneval",
            '{"include": [], "prompt": "x"}\n{"tag": "colors", "prompt": "x"}',
            "has no 'tag'",
        ),
        (
            "geneval",
            '{"tag": "colors", "include": 3, "prompt": "x"}',
            "a list of what the picture includes",
        ),
        (
            "geneval",
            '{"tag": "colors", "include": [{"class": "cat"}], "prompt": "x"}',
            "has no 'count'",
        ),
        (
            "geneval",
            '{"tag": "colors", "include": [{"class": "cat", "count": "1"}], "prompt": "x"}',
            "a class and a count",
        ),
        ("geneval", '{"tag": "colors", "include": [NaN], "prompt": "x"}', "NaN is no JSON"),
        (
            "geneval",
            '{"tag": "a/b", "include": [], "prompt": "x"}',
            "the category 'a/b' cannot name a file",
        ),
        ("dpgbench", {}, "holds no prompt"),
        (
            "dpgbench",
            {"a.b.txt": "x"},
            "'a.b' has a dot, and DPG-Bench's scorer reads ids up to the first dot",
        ),
        ("dpgbench", '{"a.b": "x"}', "up to the first dot"),
        ("dpgbench", '{"a": "x", "a": "y"}', "more than once: a"),
        (
            "dpgbench",
            '{"COCO1": "x", "coco1": "y"}',
            "only in case or in how Unicode composes them",
        ),
        (
            "dpgbench",
            '{"e\\u0301": "x", "\\u00e9": "y"}',
            "some file systems take them for one file",
        ),
        ("dpgbench", '{"x/y": "z"}', "the id 'x/y' cannot name a file"),
        ("genaibench", '{"1": {"id": "1"}}', "prompt 1 has no 'prompt'"),
        ("genaibench", '{"1": {"prompt": 3}}', "prompt 1 is 3, expected text"),
        ("genaibench", '{"1": "half \\ud83d"}', "expected text"),
        (
            "genaibench527",
            '["x"]',
            "found a list of prompts, expected for genaibench527 {id: {...}}, or {id: prompt}",
        ),
        ("mjhq30k", '{"0a": "soup"}', "found {id: prompt}, expected for mjhq30k {id: {...}}"),
        ("mjhq30k", '{"0a": {"prompt": "soup"}}', "prompt 0a has no 'category'"),
        (
            "mjhq30k",
            '{"0a": {"category": "../food", "prompt": "soup"}}',
            "the category '../food' cannot name a file",
        ),
        (
            "mjhq30k",
            '{"a/b": {"category": "food", "prompt": "soup"}}',
            "the id 'a/b' cannot name a file",
        ),
        ("coco30k", "id,caption\n3,cat\n", "has no 'image_id'"),
        ("coco30k", "id,image_id,caption\n3,4\n", "as many fields in each row as in its header"),
        ("coco30k", "id,image_id,caption\nx,4,cat\n", "prompt 0"),
        ("coco30k", "id,image_id,caption\n3,4,cat\n3,5,dog\n", "more than once: 3"),
        ("coco30k", '{"info": {}, "images": [], "annotations": []}', "prompts fetch coco30k"),
        ("coco30k", b"\xff\xfe", "expected UTF-8"),
    ],
)
def test_refused(
    tmp_path: Path, benchmark: str, text: str | bytes | dict[str, str], message: str
) -> None:
    with pytest.raises(BadPrompts) as error:
        find(benchmark, write(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path / "prompts") in str(error.value)


def test_prompts_are_found_where_they_are_fetched_to(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="`python -m eval prompts fetch geneval` brings"):
        find("geneval", folder=tmp_path)
    with pytest.raises(BadPrompts, match="expected the file of your prompts"):
        find("prompts", folder=tmp_path)
    with pytest.raises(BadPrompts, match="no such file"):
        find("prompts", tmp_path / "mine.txt")
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "evaluation_metadata.jsonl").write_text(json.dumps(BENCH))
    assert find("geneval", folder=tmp_path).items[0].text == "a photo of a bench"


def test_entries_hold_together() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.layout in LAYOUTS
        assert all(
            source.url.startswith(("https://", "http://images.coco"))
            for source in benchmark.sources
        )
        assert len({source.file for source in benchmark.sources}) == len(benchmark.sources), name
