"""Pictures, tars and models that the benchmarks are made of."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encode.models.encoder import Encoder, column_spec
from encode.tasks import ShardTask, Target
from shards import Source, create_column, open_store

# FLUX's VAE has channels of 128, 256, 512 and 512 and takes 273 GFLOP for a picture of 256 px. These
# are of its class, so that their rows have its size, and run in a time that twenty rounds allow.
MODELS: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1},
    "demo": {"block_out_channels": [8, 16, 32, 64], "layers_per_block": 1},
    "wide": {"block_out_channels": [16, 32, 64, 64], "layers_per_block": 1},
}


def picture(number: int, width: int, height: int) -> bytes:
    """A JPEG of smooth colours with some grain: of the size and decoding time of a photograph."""
    chance = np.random.default_rng(number)
    coarse = Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = chance.integers(-12, 13, (height, width, 1), np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[bytes, bytes]]) -> None:
    """A tar of (picture, caption) samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, parts in enumerate(samples):
            for suffix, data in zip(("jpg", "txt"), parts, strict=True):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def save_vae(folder: Path, size: str) -> Path:
    """An `AutoencoderKL` of random weights: 16 latent channels, f8."""
    import diffusers
    import torch

    made: Any = diffusers.AutoencoderKL  # untyped
    torch.manual_seed(0)
    made(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1, scaling_factor=0.4, **MODELS[size],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_gemma(folder: Path, fields: Mapping[str, int]) -> Path:
    """A `GemmaModel` of random weights, and a tokenizer of bytes that puts <bos> first, as Gemma's does."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    made: Any = transformers  # untyped
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer: Any = Tokenizer(
        models.BPE({t: i for i, t in enumerate(words)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    made.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="left",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = made.GemmaConfig(
        vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=2, **fields
    )
    made.GemmaModel(config).save_pretrained(folder)
    return folder


def tasks_of(
    root: Path, tars: Sequence[Path], encoders: Mapping[str, Encoder], shard_rows: int
) -> list[ShardTask]:
    """A source of these tars and a column for each encoder, ready to be encoded into a folder."""
    source = Source("bench", tuple((tar.name, tar.stat().st_size) for tar in tars), shard_rows)
    folder = open_store(root).child(source.name)
    source.put(folder)
    targets = {}
    for name, encoder in encoders.items():
        spec = column_spec(encoder, source.fingerprint, len(tars), shard_rows)
        store = folder.child(name)
        targets[name] = Target(store, create_column(store, spec), spec)
    return [
        ShardTask(
            source.name, source.fingerprint, folder, str(tar), tar.stat().st_size, number,
            shard_rows, targets,
        )
        for number, tar in enumerate(tars)
    ]  # fmt: skip
