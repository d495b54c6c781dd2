"""Small random networks of the real classes, and sets and folders of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.features.networks import Network
from eval.images.imageset import ImageSetWriter
from eval.images.layouts import Picture
from eval.prompts.prompts import Prompt, Prompts

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "cat", "dog", "flag", "on", "the"]
LENGTH = 8  # tokens that the small CLIP takes


def save_clip(folder: Path, side: int = 28) -> Path:
    """A CLIP of 12 features with a tokenizer of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    layers = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(3)
    text = layers | {
        "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = layers | {"image_size": side, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    ).save_pretrained(folder)  # fmt: skip
    return folder


class ScriptedInception(torch.nn.Module):
    """Has the one part of the real TorchScript file that clean-fid uses: `layers`, giving 2,048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def save_inception(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(ScriptedInception().eval()).save(str(folder / "inception-2015-12-05.pt"))
    return folder


def colours() -> Network:
    """Stands in for Inception behind clean-fid's resize: 48 features, means of a 4 x 4 grid of each channel."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    return Network(
        "colours", "00" * 32, "clean299", 48, lambda p: torch.from_numpy(resize(p).transpose(2, 0, 1)),
        lambda pixels: torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1),
    )  # fmt: skip


def picture(chance: np.random.Generator, width: int = 32, height: int = 32) -> Picture:
    coarse = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


def prompts_of(count: int, groups: bool = False) -> Prompts:
    names = (WORDS[4 + i % 6] for i in range(count))
    return Prompts("tiny", tuple(
        Prompt(f"{i:03d}", f"the {name}", ("x", "y")[i % 2] if groups else None) for i, name in enumerate(names)
    ))  # fmt: skip


def save_set(
    folder: Path, prompts: Prompts, seed: int = 0, layout: str = "flat", count: int = 1
) -> Path:
    """A finished set of random pictures of 32 x 32."""
    chance = np.random.default_rng(seed)
    images = ImageSetWriter(folder, prompts, {"seed": seed}, layout, count)
    for file in images.files:
        images.save(file, [picture(chance) for _ in file.numbers])
    images.finish({})
    return folder


def save_folder(folder: Path, count: int, seed: int = 0, below: tuple[str, ...] = ("",)) -> Path:
    """Pictures that are not square, in folders in turns."""
    chance = np.random.default_rng(seed)
    for i in range(count):
        path = folder / below[i % len(below)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(chance, 40, 33)).save(path)
    return folder
