"""A tiny random model of every family that columns are made with, saved as its hub repository is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.encode.toy import save_gemma, save_kl, save_qwen

SIDE = 32  # of the pictures that all of these take

DOWN = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VIDEO = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}


def saved(folder: Path, library: str, cls: str, config: dict[str, Any], seed: int = 0) -> Path:
    """A random model of a class, in a folder."""
    import importlib

    import torch

    torch.manual_seed(seed)
    made = getattr(importlib.import_module(library), cls)
    model = made(made.config_class(**config)) if library == "transformers" else made(**config)
    model.save_pretrained(folder)
    return folder


def save_sd35(folder: Path) -> Path:
    """With the convolutions around the latent that FLUX and SD3 leave out."""
    return save_kl(folder, seed=2, use_quant_conv=True, use_post_quant_conv=True)


def save_f16(folder: Path) -> Path:
    """One halving more and fewer channels: f16c4."""
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "block_out_channels": [8] * 5, "latent_channels": 4, "norm_num_groups": 4, "sample_size": SIDE,
        "shift_factor": 0.0, "scaling_factor": 0.5,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKL", config)


def save_flux2(folder: Path) -> Path:
    """Its batch norm has seen something."""
    import torch
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    model = AutoencoderKLFlux2(
        **DOWN, block_out_channels=[8, 16, 16, 16], latent_channels=4, norm_num_groups=4,
        sample_size=SIDE,
    )  # fmt: skip
    model.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    model.bn.running_var.copy_(torch.linspace(0.5, 4, 16))
    model.save_pretrained(folder)
    return folder


def save_qwen21(folder: Path) -> Path:
    """Four channels in, as Qwen-Image 2.1 has them."""
    config = {
        **VIDEO, "z_dim": 6, "dim_mult": [1, 1, 2, 2, 2], "latents_mean": [0.1 * i for i in range(6)],
        "latents_std": [1.0 + i for i in range(6)],
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKLQwenImage21", config)


def save_wan(folder: Path) -> Path:
    """Wan 2.2: it puts the pixels into patches itself."""
    config = {
        **VIDEO, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "latents_mean": [0.5] * 4,
        "latents_std": [2.0] * 4, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKLWan", config)


def save_hunyuan(folder: Path) -> Path:
    config = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": [32, 32, 64],
        "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": SIDE,
        "scaling_factor": 0.5,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKLHunyuanImage", config)


def save_dc(folder: Path, stages: int = 3) -> Path:
    """Its sides are those of the pictures, halved once less than there are stages."""
    kinds = ["ResBlock"] * (stages - 1) + ["EfficientViTBlock"]
    channels, scales = [8] + [16] * (stages - 1), [[]] * (stages - 1) + [[5]]
    config = {
        "latent_channels": 8, "attention_head_dim": 8, "scaling_factor": 0.41407,
        "encoder_block_types": kinds, "decoder_block_types": kinds,
        "encoder_block_out_channels": channels, "decoder_block_out_channels": channels,
        "encoder_layers_per_block": [1] * stages, "decoder_layers_per_block": [1] * stages,
        "encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales,
        "downsample_block_type": "Conv",
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderDC", config)


def save_taesd(folder: Path) -> Path:
    config = {
        "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
        "num_encoder_blocks": [1] * 4, "num_decoder_blocks": [1] * 4,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderTiny", config)


def save_rae(folder: Path) -> Path:
    config = {
        "encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "patch_size": 8,
        "encoder_input_size": SIDE, "latents_mean": [[[0.25]]] * 64, "latents_std": [[[2.0]]] * 64,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderRAE", config)


def save_asymmetric(folder: Path) -> Path:
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 3, "down_block_out_channels": [8, 8, 16],
        "up_block_types": ["UpDecoderBlock2D"] * 3, "up_block_out_channels": [8, 8, 16], "norm_num_groups": 4,
        "sample_size": SIDE, "scaling_factor": 0.18215,
    }  # fmt: skip
    return saved(folder, "diffusers", "AsymmetricAutoencoderKL", config)


def save_vq(folder: Path) -> Path:
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 8, 16], "norm_num_groups": 4, "num_vq_embeddings": 16, "scaling_factor": 0.5,
    }  # fmt: skip
    return saved(folder, "diffusers", "VQModel", config)


def save_kvae(folder: Path) -> Path:
    config = {
        "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": [1, 1, 1, 1],
        "sample_size": SIDE,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKLKVAE", config)


# Text --------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(
    folder: Path, special: list[str], single: str, chat: str | None = None, **named: str
) -> int:
    """A tokenizer of bytes; `single` says what stands around a caption, `$A`. Its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, i) for i, t in enumerate(special) if t in single.split()]
    )
    more = [t for t in special if t not in named.values()]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat, additional_special_tokens=more, **named
    ).save_pretrained(folder)
    return len(vocabulary)


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}


def save_gemma2(folder: Path) -> Path:
    """Soft caps that bite, and a window shorter than the captions."""
    special = ["<pad>", "<eos>", "<bos>"]
    size = save_tokenizer(
        folder, special, "<bos> $A", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    config = {
        **GROUPED, "vocab_size": size, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5,
        "initializer_range": 0.2, "sliding_window": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    return saved(folder, "transformers", "Gemma2Model", config)


def save_t5(folder: Path) -> Path:
    """The whole of a T5, of which T5EncoderModel takes its half; <eos> behind, nothing before."""
    special = ["<pad>", "</s>"]
    size = save_tokenizer(folder, special, "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = {
        "vocab_size": size, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    }  # fmt: skip
    return saved(folder, "transformers", "T5ForConditionalGeneration", config)


def save_clip(folder: Path) -> Path:
    """Both towers, as hub repositories have them; its tokenizer pads with <eos>."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    size = save_tokenizer(
        folder, special, "<|startoftext|> $A <|endoftext|>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    text = {**SMALL, "vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    eyes = {**SMALL, "image_size": SIDE, "patch_size": 16}
    return saved(folder, "transformers", "CLIPModel", {"text_config": text, "vision_config": eyes})


def save_qwen_text(folder: Path, cls: str = "Qwen2ForCausalLM") -> Path:
    """No token around a caption, and a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = save_tokenizer(
        folder, special, "$A", CHAT, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    return saved(folder, "transformers", cls, {**GROUPED, "vocab_size": size})


def save_qwen3(folder: Path) -> Path:
    return save_qwen_text(folder, "Qwen3ForCausalLM")


# Image features ----------------------------------------------------------------------------------


def save_preprocessor(folder: Path, **says: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(says))
    return folder


def save_dinov2(folder: Path) -> Path:
    config = {**SMALL, "image_size": SIDE, "patch_size": 16}
    saved(folder, "transformers", "Dinov2Model", config)
    return save_preprocessor(
        folder, image_processor_type="BitImageProcessor", size={"shortest_edge": 40},
        crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True, do_normalize=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], rescale_factor=1 / 255,
    )  # fmt: skip


def save_siglip(folder: Path) -> Path:
    """Both towers; SiglipVisionModel takes one."""
    eyes = {**SMALL, "image_size": SIDE, "patch_size": 16}
    text = {**SMALL, "vocab_size": 64}
    config = {"vision_config": eyes, "text_config": text}
    saved(folder, "transformers", "SiglipModel", config)
    return save_preprocessor(
        folder, image_processor_type="SiglipImageProcessor", size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


# What the tests ask for by name: (class to load, builder).
VAES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "flux": ("AutoencoderKL", save_kl),
    "sd35": ("AutoencoderKL", save_sd35),
    "qwen": ("AutoencoderKLQwenImage", save_qwen),
    "f16": ("AutoencoderKL", save_f16),
    "flux2": ("AutoencoderKLFlux2", save_flux2),
    "qwen21": ("AutoencoderKLQwenImage21", save_qwen21),
    "wan": ("AutoencoderKLWan", save_wan),
    "hunyuan": ("AutoencoderKLHunyuanImage", save_hunyuan),
    "dc": ("AutoencoderDC", save_dc),
    "taesd": ("AutoencoderTiny", save_taesd),
    "rae": ("AutoencoderRAE", save_rae),
    "asymmetric": ("AsymmetricAutoencoderKL", save_asymmetric),
    "vq": ("VQModel", save_vq),
    "kvae": ("AutoencoderKLKVAE", save_kvae),
}
TEXTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "gemma": ("GemmaModel", save_gemma),
    "gemma2": ("Gemma2Model", save_gemma2),
    "t5": ("T5EncoderModel", save_t5),
    "clip": ("CLIPTextModel", save_clip),
    "qwen2": ("Qwen2Model", save_qwen_text),
    "qwen3": ("AutoModel", save_qwen3),
}
EYES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "dinov2": ("AutoModel", save_dinov2),
    "siglip": ("SiglipVisionModel", save_siglip),
}


class Models:
    """Builds a model when it is first asked for, and keeps it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> dict[str, str]:
        """`encoder` of a column's config."""
        cls, build = {**VAES, **TEXTS, **EYES}[name]
        folder = self.folder / f"model-{name}"
        if not folder.exists():
            build(folder)
        return {"class": cls, "path": str(folder)}
