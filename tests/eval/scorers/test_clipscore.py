"""CLIP score of each picture and its prompt, against CLIPModel's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.commands import main
from eval.errors import MissingImages, MissingWeights, NotFinite
from eval.images.imageset import ImageSetReader
from eval.prompts.prompts import Prompt, Prompts
from eval.scores import results
from tests.commands.lines import next_lines
from tests.eval.small import WORDS, save_clip, save_folder, save_set


@torch.no_grad()
def test_scores_are_cosines_of_the_models_own_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    clip = save_clip(tmp_path / "clip")
    texts = ["a red cat", "the dog", "blue flag on the cat", " ".join(WORDS[4:])]
    prompts = Prompts("tiny", tuple(
        Prompt(f"{i}", text, ("x", "y")[i % 2]) for i, text in enumerate(texts)
    ))  # fmt: skip
    folder = save_set(tmp_path / "set", prompts, layout="folders", count=2)
    words = ["score", "clipscore", str(folder), "--model", str(clip), "--device", "cpu"]
    main(words)
    (score,) = results.read_all(folder).values()
    assert score.scorer.startswith("clipscore-vit-16-14-28-")
    out, err = capsys.readouterr()
    assert "1 of 4 captions were cut" in out
    assert next_lines(out + err) == [f"next: python -m eval report {folder} --out report.html"]
    items = results.read_items(folder / "scores" / f"{score.scorer}.json")
    assert len(items) == 8
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    for item, single in zip(items, ImageSetReader.open(folder), strict=True):
        ids = [WORDS.index(word) for word in single.file.prompt.text.split()][:6]
        inputs = processor(images=Image.open(single.path), return_tensors="pt")
        actual = model(**inputs, input_ids=torch.tensor([[1, *ids, 2]]))
        cosine = float(actual.logits_per_image / model.logit_scale.exp())
        assert item.found["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert item.value == pytest.approx(100 * max(cosine, 0), abs=1e-3)
        assert item.found["cut"] == (single.file.prompt.id == "3")
        assert (item.prompt, item.number) == (single.file.prompt.id, single.number)
    values = {item.prompt: item.value for item in items}
    assert score.value.value == pytest.approx(sum(i.value for i in items) / 8)
    assert set(score.groups) == {"x", "y"}
    assert score.better == "higher"
    assert len(values) == 4


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"gone.*--model"):
        main(["score", "clipscore", str(tmp_path), "--model", str(tmp_path / "gone")])


def test_a_set_without_pictures_and_a_model_that_answers_nan(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    folder = save_set(tmp_path / "set", Prompts("tiny", (Prompt("0", "a red cat"),)))
    words = ["score", "clipscore", str(folder), "--model", str(clip), "--device", "cpu"]
    weights = load_file(clip / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = float("nan")
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFinite, match=r"0\.png: found NaN or infinity in the features"):
        main(words)
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(MissingImages, match="set: found no picture, expected at least one"):
        main([*words, "--partial"])
    assert not (folder / "scores").exists()


def test_a_lost_grid_lacks_all_of_its_pictures(tmp_path: Path) -> None:
    """The note of a report counts pictures: four of the one file that is absent, by a distance too."""
    clip, real = save_clip(tmp_path / "clip"), save_folder(tmp_path / "real", 4)
    prompts = Prompts("tiny", tuple(Prompt(f"{i}", "a red cat") for i in range(3)))
    folder = save_set(tmp_path / "set", prompts, layout="grids", count=4)
    (folder / "images" / "1.png").unlink()
    options = ["--model", str(clip), "--device", "cpu", "--partial"]
    main(["score", "clipscore", str(folder), *options])
    main(["score", "cmmd", str(folder), *options, "--reference", str(real)])
    scores = results.read_all(folder).values()
    assert [(score.pictures, score.missing) for score in scores] == [(8, 4), (8, 4)]
    assert all(score.scorer.endswith("-partial-2-of-3") for score in scores)  # files
