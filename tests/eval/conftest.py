"""Small real models: a random VAE with a norm far from identity, a random language model, a checkpoint of a DiT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from encode.registry import ModelSpec
from encode.text import TextEncoder
from encode.vae import Vae
from shards import seal, sha256_file
from tests.eval.judged import clip_folder, detector_folder, llava_folder, qwen_folder  # noqa: F401 - fixtures
from train.model import DiT, DiTConfig

NORM = {"shift": [3.0], "scale": [0.05]}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "cat", "dog", "flag", "on", "the"]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16], latent_channels=4, norm_num_groups=4, sample_size=32,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=3.0, scaling_factor=0.05,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    folder = tmp_path_factory.mktemp("models") / "text"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae(vae_folder: Path) -> Vae:
    return Vae(ModelSpec.model_validate({"class": "AutoencoderKL", "path": str(vae_folder)}))


@pytest.fixture(scope="session")
def text(text_folder: Path) -> TextEncoder:
    model = ModelSpec.model_validate({"class": "BertModel", "path": str(text_folder)})
    return TextEncoder(model, max_tokens=16)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, vae: Vae, text: TextEncoder) -> Path:
    """A run with two checkpoints. Step 10: weights as initialised, so the velocity is 0 everywhere and what is sampled
    is the noise itself; its average: weights that do follow the prompt. Step 20: the same, written as the newest."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = DiTConfig(
        hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=48, in_channels=4, out_channels=4,
        text_width=24, pos_embed_max_size=16,
    )  # fmt: skip
    still, moving = DiT(config), DiT(config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in moving.parameters():
            parameter.normal_(0, 0.2)
    data = {
        "latents": {
            "identity": {
                "encoder": vae.model.identity(vae.weights),
                "preprocess": {"resolution": 32},
            },
            "norm": NORM,
        },
        "text": {
            "identity": {
                "encoder": text.model.identity(text.weights),
                "preprocess": {
                    "max_tokens": 16,
                    "hidden_state": -1,
                    "template": "{}",
                    "tokenizer": text.tokenizer,
                },
            }
        },
    }
    for step in (10, 20):
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        files: dict[str, Any] = {}
        for name, model in (("weights", still), ("ema", moving)):
            file = path / f"{name}.safetensors"
            save_file(model.state_dict(), file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        record = {
            "format": "latentbank-checkpoint", "version": 1, "step": step, "model": config.model_dump(),
            "data": data, "files": files,
        }  # fmt: skip
        (path / "manifest.json").write_bytes(seal(record))
    return folder
