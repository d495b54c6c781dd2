"""Small real models that judge pictures, saved to folders: Mask2Former, CLIP, and two that answer about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SPECIAL = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
SENTENCES = (
    "Yes No yes no user assistant : Does this figure show Please answer or . , ? Is Are there a an the photo of "
    "colored object - red orange yellow green blue purple pink brown black white cat dog bench kite two on it "
    "Two 2 three 3 one How many"
)
WORDS = SENTENCES.split()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for c in m.content %}{% if c.type == 'image' %}PICTURE{% else %} "
    "{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def tokenizer(ends: bool = False) -> Any:
    """A word a token; [EOS] behind the text where CLIP looks for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    cutter = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    cutter.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        cutter.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=cutter, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


def _spread(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that outputs differ from input to input."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)


VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sure of classes, so that something is found."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, num_queries=12, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(20)
    folder = tmp_path_factory.mktemp("models") / "Tiny-M2F"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    cut = tokenizer(ends=True)
    text = CLIPTextConfig(
        vocab_size=len(cut), hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(**VISION)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10)
    )
    _spread(model, 1)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    model.save_pretrained(folder)
    cut.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    cut = tokenizer()
    vision = CLIPVisionConfig(**VISION)
    text = LlamaConfig(
        vocab_size=len(cut), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    image = cut.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1
        )
    )
    _spread(model, 2)
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llava"
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=cut, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the family that is asked unless another is chosen: positions in three dimensions, pictures of any size."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    cut = tokenizer()
    rope = {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "rope_theta": 1e4,
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(cut), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": rope,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    _spread(model, 3)
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    model.save_pretrained(folder)
    prepare = {
        "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 1024},
    }  # fmt: skip
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**prepare), tokenizer=cut,
        video_processor=Qwen3VLVideoProcessor(**prepare),
        chat_template=TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder
