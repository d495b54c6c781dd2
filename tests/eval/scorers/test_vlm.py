"""Probabilities of the first answer token against a plain forward and softmax, for two kinds of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.errors import MissingWeights
from eval.scorers.vlm import ANY, EXACT, Answer, Spellings, Vlm

QUESTIONS = [
    "Is there a cat ?",
    "Does this figure show a red dog or a blue cat ?",
    "Is the dog white ?",
]


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def by_hand(folder: Path, shown: np.ndarray, question: str) -> tuple[torch.Tensor, Any]:
    """Probabilities (V,) behind one prompt, written out and not padded, and the tokenizer."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    cls = (
        "LlavaForConditionalGeneration"
        if "Llava" in folder.name
        else "Qwen3VLForConditionalGeneration"
    )
    mark = "<image>" if "Llava" in folder.name else "<|vision_start|><|image_pad|><|vision_end|>"
    model = getattr(transformers, cls).from_pretrained(folder, dtype=torch.float32).eval()
    text = f"user : {mark} {question} assistant :"
    inputs = processor(text=[text], images=[Image.fromarray(shown)], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    return logits.softmax(-1), processor.tokenizer


@pytest.fixture(scope="module", params=["llava_folder", "qwen_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    actual: Path = request.getfixturevalue(request.param)
    return actual


def test_answers_are_those_of_a_plain_forward(folder: Path) -> None:
    """Questions of several lengths in one batch, and one that is left over."""
    shown = picture(0)
    exact = Vlm(str(folder), "cpu", EXACT, batch_size=2).answers(shown, QUESTIONS)
    either = Vlm(str(folder), "cpu", ANY, batch_size=2).answers(shown, QUESTIONS)
    for question, single, both in zip(QUESTIONS, exact, either, strict=True):
        odds, tokenizer = by_hand(folder, shown, question)
        yes, no, small_yes, small_no = (
            odds[tokenizer.convert_tokens_to_ids(word)].item()
            for word in ("Yes", "No", "yes", "no")
        )
        assert (single.yes, single.no) == (
            pytest.approx(yes, rel=1e-4),
            pytest.approx(no, rel=1e-4),
        )
        assert both.yes == pytest.approx(yes + small_yes, rel=1e-4)
        assert both.no == pytest.approx(no + small_no, rel=1e-4)
        assert single.yes + single.no < 0.999


def test_odds_of_accepted_beginnings(folder: Path) -> None:
    """Each question with its own; a beginning that several share counts once."""
    shown = picture(0)
    vlm = Vlm(str(folder), "cpu", ANY, batch_size=2)
    accepted = (("Two", "two", "2", " two"), ("Yes",), ("two cat", "two", "unheard"))
    actual = vlm.odds([(shown, question) for question in QUESTIONS], accepted)
    for question, words, value in zip(
        QUESTIONS, (("Two", "two", "2"), ("Yes",), ("two",)), actual, strict=True
    ):
        odds, tokenizer = by_hand(folder, shown, question)
        expected = sum(odds[tokenizer.convert_tokens_to_ids(word)].item() for word in words)
        assert value == pytest.approx(expected, rel=1e-4)


def test_answers_depend_on_picture_and_question(folder: Path) -> None:
    vlm = Vlm(str(folder), "cpu", EXACT)
    first, second = vlm.answers(picture(0), QUESTIONS[:2])
    other = vlm.answers(255 - picture(0), QUESTIONS[:1])[0]
    assert len({first.yes, second.yes, other.yes}) == 3
    again = vlm.answers(picture(0), QUESTIONS[:2])
    assert again == [first, second]
    assert vlm.answers(picture(0), []) == []


def test_pictures_of_any_shape(folder: Path) -> None:
    vlm = Vlm(str(folder), "cpu", EXACT)
    for height, width in ((16, 16), (90, 30), (33, 65)):
        answer = vlm.answers(picture(1, height, width), QUESTIONS[:1])[0]
        assert 0 < answer.yes < 1


def test_identity_tells_models_and_preparations_apart(folder: Path, tmp_path: Path) -> None:
    import transformers

    single, same = (Vlm(str(folder), "cpu", EXACT).identity for _ in range(2))
    assert single == same
    assert single["dtype"] == "float32"
    assert Vlm(str(folder), "cpu", ANY).identity != single
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template += " "
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    changed = Vlm(str(tmp_path), "cpu", EXACT).identity
    assert changed["weights"] == single["weights"]
    assert changed["processor"] != single["processor"]


def test_models_that_cannot_answer_are_named(llava_folder: Path, tmp_path: Path) -> None:
    import transformers

    with pytest.raises(MissingWeights, match=r"its vocabulary has none of 'perhaps' as one token"):
        Vlm(str(llava_folder), "cpu", Spellings(("perhaps",), ("No",)))
    with pytest.raises(MissingWeights, match=r"Qwen/none.*hf download Qwen/none"):
        Vlm("Qwen/none", "cpu", EXACT)
    processor = transformers.AutoProcessor.from_pretrained(llava_folder)
    processor.save_pretrained(tmp_path)
    with pytest.raises(MissingWeights, match="AutoModelForImageTextToText"):
        Vlm(str(tmp_path), "cpu", EXACT)
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path / "mute")
    with pytest.raises(MissingWeights, match="no chat template"):
        Vlm(str(tmp_path / "mute"), "cpu", EXACT)


def test_missing_weights_are_not_made_up(llava_folder: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.AutoProcessor.from_pretrained(llava_folder).save_pretrained(tmp_path)
    for file in llava_folder.iterdir():
        if file.suffix == ".json" and not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(llava_folder / "model.safetensors")
    gone = next(name for name in weights if "lm_head" in name)
    weights.pop(gone)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MissingWeights, match=r"1 weights of AutoModel\w+ are not in it, \['lm_head"
    ):
        Vlm(str(tmp_path), "cpu", EXACT)


def test_answers_are_plain_numbers(llava_folder: Path) -> None:
    answer = Vlm(str(llava_folder), "cpu", EXACT).answers(picture(0), QUESTIONS[:1])[0]
    assert isinstance(answer, Answer)
    assert type(answer.yes) is float
