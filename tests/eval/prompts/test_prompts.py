"""Prompt files in their two formats, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.errors import BadPrompts
from eval.prompts.files import read_prompts
from eval.prompts.prompts import Prompt


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mjhq.txt", "a cat\n\n  ein Hündchen 🐶 \n"),
        ("mjhq.json", '["a cat", "ein Hündchen 🐶"]'),
        ("mjhq.json", '{"00000": "a cat", "00001": "ein Hündchen 🐶"}'),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str) -> None:
    prompts = read_prompts(write(tmp_path, name, text))
    assert prompts.benchmark == "mjhq"
    assert prompts.items == (Prompt("00000", "a cat"), Prompt("00001", "ein Hündchen 🐶"))


def test_ids_and_long_prompts_are_kept(tmp_path: Path) -> None:
    long = "x" * 10_000
    prompts = read_prompts(write(tmp_path, "p.json", f'{{"b.2": "{long}", "ä": ""}}'))
    assert prompts.items == (Prompt("b.2", long), Prompt("ä", ""))


def test_digest_follows_ids_texts_and_order(tmp_path: Path) -> None:
    texts = [
        '{"a": "x", "b": "y"}',
        '{"b": "y", "a": "x"}',
        '{"a": "x", "b": "z"}',
        '{"a": "x", "c": "y"}',
    ]
    digests = {read_prompts(write(tmp_path, "p.json", text)).digest for text in texts}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", "{}", "holds no prompt"),
        ("p.json", '{"a": "x", "a": "y"}', "more than once: a"),
        ("p.json", '{"a/b": "x"}', "cannot name a file"),
        ("p.json", '{"..": "x"}', "cannot name a file"),
        ("p.json", '{"": "x"}', "cannot name a file"),
        ("p.json", '{"a\\u0000": "x"}', "cannot name a file"),
        ("p.json", f'{{"{"a" * 300}": "x"}}', "cannot name a file"),
        ("p.json", '["x", 3]', "prompt 00001 is 3, expected text"),
        ("p.json", '[{"prompt": "x"}]', "expected text"),
        ("p.json", '"x"', "expected a list"),
        ("p.json", "[", "not valid JSON"),
        ("p.txt", b"\xff\xfe", "expected UTF-8"),
        ("p.csv", "x", "ends in .txt or .json"),
    ],
)
def test_refused(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(BadPrompts) as error:
        read_prompts(write(tmp_path, name, text))
    assert message in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="no such file"):
        read_prompts(tmp_path / "p.txt")
