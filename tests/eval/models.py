"""Small real models of random weights, written to folders: a VAE with a norm far from identity, a language model, a
run of ours, and the same weights as the reference keeps them. For tests, and for sweeps that are no tests of pytest's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from encode.models.text import TextEncoder
from encode.models.vae import Vae
from shards import seal, sha256_file
from train.checkpoints.reference import STATES
from train.model.dit import DiT, DiTConfig

NORM = {"shift": [3.0], "scale": [0.05]}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "cat", "dog", "flag", "on", "the"]
DIT = DiTConfig(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=48, in_channels=4, out_channels=4,
    text_width=24, pos_embed_max_size=16,
)  # fmt: skip


def save_vae(folder: Path, channels: int = 4) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16], latent_channels=channels, norm_num_groups=4, sample_size=32,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=3.0, scaling_factor=0.05,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_text(folder: Path, width: int = 24) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def states() -> dict[str, dict[str, Tensor]]:
    """Weights as initialised, so that the velocity is 0 everywhere and what is sampled is the noise itself; and, as
    their average, weights that do follow the prompt."""
    still, moving = DiT(DIT), DiT(DIT)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in moving.parameters():
            parameter.normal_(0, 0.2)
    return {"weights": still.state_dict(), "ema": moving.state_dict()}


def save_run(folder: Path, vae: Vae, text: TextEncoder) -> Path:
    """A run with the checkpoints 10 and 20, both of the same weights."""
    read = {
        "max_tokens": text.config.max_tokens,
        "hidden_state": -1,
        "template": "{}",
        "tokenizer": text.tokenizer.weights,
    }
    data = {
        "latents": {
            "identity": {"encoder": vae.model.identity(vae.weights).record(), "preprocess": {"resolution": 32}},
            "norm": NORM,
        },
        "text": {"identity": {"encoder": text.model.identity(text.weights).record(), "preprocess": read}},
    }  # fmt: skip
    for step in (10, 20):
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        files: dict[str, Any] = {}
        for name, state in states().items():
            file = path / f"{name}.safetensors"
            save_file(state, file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        record = {
            "format": "latentbank-checkpoint", "version": 1, "step": step, "model": DIT.model_dump(),
            "data": data, "files": files,
        }  # fmt: skip
        (path / "manifest.json").write_bytes(seal(record))
    return folder


def save_reference(folder: Path, steps: tuple[int, ...] = (20,), **fields: Any) -> Path:
    """The same weights in the reference's folder."""
    kept = states()
    for step in steps:
        (folder / str(step)).mkdir(parents=True)
        content = {"module": kept["weights"], "ema": kept["ema"], "global_steps": step}
        torch.save(content, folder / str(step) / STATES)
    (folder / "config.json").write_text(json.dumps({**DIT.to_reference(), **fields}))
    return folder
