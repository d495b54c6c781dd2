"""Networks see pictures as their own libraries prepare them, and say what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.commands import main
from eval.errors import BadRequest, MissingWeights
from eval.features import pretrained
from eval.features.networks import INCEPTION, Clip, dinov2, inception
from tests.eval.small import (
    LENGTH,
    WORDS,
    ScriptedInception,
    picture,
    save_clip,
    save_folder,
    save_inception,
)
from tests.train.here import forked

SIZES = [(40, 33), (33, 60), (28, 28)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@torch.no_grad()
def test_clip_sees_what_its_own_processor_gives(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    network = Clip(str(clip_folder)).network("short-bicubic")
    assert (network.name, network.resize, network.width) == (
        "clip-vit-16-14-28",
        "short28-bicubic",
        12,
    )
    for size in SIZES:
        pixels = picture(np.random.default_rng(0), *size)
        actual = network.features(network.prepare(pixels)[None])
        inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
        expected = model(**inputs, input_ids=torch.tensor([[1, 4, 2]])).image_embeds
        unit = torch.nn.functional.normalize(actual)
        torch.testing.assert_close(unit, expected, atol=1e-5, rtol=1e-4)


def test_code_of_a_tokenizer_is_not_run(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asked for on the terminal."""
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()"
    )
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "T"}
    file.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "own.T"]}}))
    model = folder / "config.json"  # of a type that transformers does not know
    model.write_text(json.dumps({**json.loads(model.read_text()), "model_type": "x_custom"}))
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    with pytest.raises(MissingWeights, match="cannot be loaded as AutoTokenizer"):
        pretrained.part("AutoTokenizer", str(folder))
    assert not questions
    assert not (tmp_path / "mark").exists()


@torch.no_grad()
def test_captions_are_padded_cut_and_counted(clip_folder: Path) -> None:
    from transformers import CLIPModel

    model, clip = CLIPModel.from_pretrained(clip_folder).eval(), Clip(str(clip_folder))
    clip.load_tokenizer()
    actual, cut = clip.captions(["a red cat", "the dog", " ".join(WORDS[4:])])
    assert cut == [False, False, True]
    ids = [[1, 4, 5, 7, 2], [1, 11, 8, 2], [1, *range(4, 4 + LENGTH - 2), 2]]
    pixels = torch.zeros(1, 3, 28, 28)
    for item, tokens in zip(actual, ids, strict=True):
        expected = model(pixel_values=pixels, input_ids=torch.tensor([tokens])).text_embeds[0]
        torch.testing.assert_close(
            torch.nn.functional.normalize(item, dim=0), expected, atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_dinov2_gives_its_normalised_class_token(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    model = Dinov2Model(Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    network = dinov2(str(tmp_path))
    assert (network.name, network.width) == ("dinov2-vit-16-14", 16)
    processor = BitImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for size in SIZES:
        pixels = picture(np.random.default_rng(1), *size)
        inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
        expected = model(**inputs).last_hidden_state[:, 0]
        actual = network.features(network.prepare(pixels)[None])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_inceptions_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    network = inception(save_inception(tmp_path / "a"))
    torch.manual_seed(0)
    stand_in, pixels = ScriptedInception().eval(), torch.rand(2, 3, 299, 299) * 255
    with torch.no_grad():
        torch.testing.assert_close(network.features(pixels), stand_in((pixels - 128) / 128))
    assert inception(save_inception(tmp_path / "b", seed=1)).weights != network.weights


def test_a_device_that_does_not_exist_is_named(tmp_path: Path) -> None:
    weights = save_inception(tmp_path / "weights")
    for name, expected in (("gpu", "cpu, cuda or cuda:NUMBER"), ("cuda:99", "at least 100")):
        with pytest.raises(BadRequest, match=expected):
            inception(weights, name)


def test_missing_weights_are_named_with_a_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"found no inception-2015-12-05\.pt in .*--inception"):
        inception(tmp_path)
    for load in (lambda path: Clip(path), dinov2):
        with pytest.raises(MissingWeights, match=r"gone.*hf download.*--model"):
            load(str(tmp_path / "gone"))
    folder = save_clip(tmp_path / "clip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        MissingWeights, match=r"clip: expected a tokenizer of the model's 12 tokens, found \d "
    ):
        Clip(str(folder)).load_tokenizer()


def test_weights_that_are_cut_off_are_named(tmp_path: Path) -> None:
    path = save_inception(tmp_path) / INCEPTION
    for data in (path.read_bytes()[:5_000], b"", b"<html>not found</html>"):
        path.write_bytes(data)
        with pytest.raises(MissingWeights, match=rf"{INCEPTION}: not the weights .*Fetch https:"):
            inception(tmp_path)
    torch.save({"layers": torch.zeros(1)}, path)
    with pytest.raises(MissingWeights, match="not the weights"):
        inception(tmp_path)


def test_missing_weights_on_the_command_line(tmp_path: Path) -> None:
    a = save_folder(tmp_path / "a", 3)
    words = ["fid", str(a), str(a), "--inception", str(tmp_path)]
    code, output = forked(lambda: main(words), tmp_path / "log")
    assert code == 2
    assert output.startswith("MissingWeights: FID needs Inception's weights")
    assert output.count("\n") == 1
