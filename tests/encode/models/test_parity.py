"""The column is what the online path gives: tar -> PIL and torchvision -> the library's own class,
in fp32, one by one, against what a run has stored.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import configs
from encode.config import EncodeConfig
from encode.run.job import run
from shards import Column
from tests.encode.tiny_models import SIDE, TEXTS, VAES, Models
from tests.encode.toy import jpeg, tar_bytes

ROWS = 6
CAPTIONS = [
    "a cat", "a photograph of an astronaut who rides a horse on the moon, in colour", "Größe 😀",
    "two words", "a cat on a mat with a hat and a bat, and a rat that sat on the cat", "x",
]  # fmt: skip
LATENTS = ("dc", "taesd", "rae", "vq")
NORMS = {"dc": 0.41407, "hunyuan": 0.5, "kvae": 1.0}


def column_of(name: str, tiny: Models) -> dict[str, Any]:
    if name in TEXTS:
        return {"kind": "tokens", "encoder": tiny(name), "max_tokens": 60}
    kind = "latents" if name in LATENTS else "moments"
    norm = {"norm": {"shift": [0.0], "scale": [NORMS[name]]}} if name in NORMS else {}
    return {"kind": kind, "encoder": tiny(name), "resolution": SIDE, **norm}


@pytest.fixture(scope="module")
def cache(tiny: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family, in one pass over one tar."""
    folder = tmp_path_factory.mktemp("parity")
    members = []
    for row, caption in enumerate(CAPTIONS):
        members += [
            (f"{row}.jpg", jpeg(row, quality=90)),
            (f"{row}.txt", caption.encode()),
            (f"{row}.short.txt", caption[:3].encode()),
        ]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    config = {
        "root": str(folder / "cache"), "sources": {"toy": str(folder / "0.tar")},
        "columns": {name: column_of(name, tiny) for name in (*VAES, *TEXTS)}
        | {"short": {**column_of("gemma", tiny), "caption": "short.txt"},
           "eyes": {"kind": "features", "encoder": tiny("dinov2")},
           "ids": {"kind": "ids", "encoder": tiny("t5"), "max_tokens": 60}},
        "engine": {"executor": "inline", "device": "cpu", "batch": 4, "tokens": 128},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    assert run(configs.load(EncodeConfig, folder / "c.yaml")) == 0
    return folder / "cache/toy"


def stored(cache: Path, name: str) -> Any:
    column = Column.open(cache / name)
    rows = np.arange(ROWS)
    assert (column.status(rows) == 0).all()
    if not column.layout.ragged:
        return torch.from_numpy(column.read(rows, check=True)).float()
    parts = np.split(column.read(rows, check=True), np.cumsum(column.lengths(rows))[:-1])
    if column.layout.kind == "ids":
        return [part.tolist() for part in parts]
    return [torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).float() for part in parts]


def online_pixels() -> list[Tensor]:
    """The reference's transform, by torchvision."""
    from torchvision import transforms

    transform = transforms.Compose([
        transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(SIDE), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    pictures = [Image.open(io.BytesIO(jpeg(n, quality=90))).convert("RGB") for n in range(ROWS)]
    return [transform(picture)[None] for picture in pictures]


@torch.no_grad()
@pytest.mark.parametrize("name", list(VAES))
def test_pictures(cache: Path, tiny: Models, name: str) -> None:
    import diffusers
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    model = getattr(diffusers, VAES[name][0]).from_pretrained(tiny(name)["path"]).eval()
    online = []
    for x in online_pixels():
        if name == "qwen21":
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        if name in ("qwen", "qwen21", "wan"):
            x = x[:, :, None]
        output = model.encode((x + 1) / 2 if name == "rae" else x)
        if name in LATENTS:
            online.append(output.latents if name in ("taesd", "vq") else output.latent)
            continue
        parts = [output.latent_dist.mean, output.latent_dist.logvar]
        if name == "flux2":
            parts = [Flux2Pipeline._patchify_latents(part) for part in parts]
        moments = torch.cat(parts, 1)
        online.append(moments[:, :, 0] if moments.ndim == 5 else moments)
    cached = stored(cache, name)
    # Half a unit in the last of 11 bits, and what batching does to fp32.
    torch.testing.assert_close(cached, torch.cat(online), rtol=2**-11, atol=2e-5)
    assert (cached[0] - cached[1]).abs().max() > 1e-3  # the pictures differ, so the rows do


@torch.no_grad()
@pytest.mark.parametrize("name", list(TEXTS))
def test_captions(cache: Path, tiny: Models, name: str) -> None:
    """Padded to the full length on the right, as the reference pads."""
    import transformers

    path = tiny(name)["path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right")
    model = getattr(transformers, TEXTS[name][0]).from_pretrained(path).eval()
    batch = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=60, return_tensors="pt"
    )
    states = model(**batch).last_hidden_state
    for row, online, mask in zip(stored(cache, name), states, batch.attention_mask, strict=True):
        # Half a unit in the last of 8 bits, and the 1e-5 between padded and ragged.
        torch.testing.assert_close(row, online[: int(mask.sum())], rtol=2**-8, atol=2e-5)


@torch.no_grad()
def test_features_and_ids(cache: Path, tiny: Models) -> None:
    import transformers

    model = transformers.Dinov2Model.from_pretrained(tiny("dinov2")["path"]).eval()
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x = (torch.cat(online_pixels()) / 2 + 0.5 - mean) / std
    online = model(pixel_values=x).last_hidden_state
    torch.testing.assert_close(stored(cache, "eyes"), online, rtol=2**-11, atol=2e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("t5")["path"])
    assert stored(cache, "ids") == tokenizer(CAPTIONS, truncation=True, max_length=60).input_ids


def test_another_caption_is_another_column(cache: Path, tiny: Models) -> None:
    lengths = [len(row) for row in stored(cache, "short")]
    assert lengths == [1 + len(caption[:3].encode().strip()) for caption in CAPTIONS]
    assert len(stored(cache, "gemma")[0]) == 1 + len(CAPTIONS[0])


def test_the_empty_caption(cache: Path) -> None:
    """Stored beside the rows of every text column."""
    lengths = {"gemma": 1, "gemma2": 1, "t5": 1, "clip": 2, "qwen2": 1, "qwen3": 1, "ids": 1}
    for name, length in lengths.items():
        assert len(Column.open(cache / name).empty()) == length, name
