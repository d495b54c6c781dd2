"""Small networks with random weights, of the classes that the frozen commands load.

    python models.py FOLDER

The weights follow from a seed: equal in all runs on one machine, but not on every kind of CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "square", "blue", "ring", "on", "grey"]
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


class Inception(torch.nn.Module):
    """The one part of clean-fid's TorchScript file that is called: `layers`, with 2,048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(pixels)
        return features


def main(folder: Path) -> None:
    from diffusers import AutoencoderTiny
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
    from transformers import PreTrainedTokenizerFast as Fast

    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(latent_channels=4, **blocks, **channels).save_pretrained(folder / "taesd")
    Dinov2Model(Dinov2Config(**LAYERS, image_size=56, patch_size=14)).save_pretrained(
        folder / "dinov2"
    )
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "intermediate_size": 24}
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 28, "patch_size": 14, "intermediate_size": 24}
    config = CLIPConfig(
        text_config={**LAYERS, **text, **ids}, vision_config={**LAYERS, **vision}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    Fast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "clip")
    (folder / "inception").mkdir()
    torch.jit.script(Inception().eval()).save(str(folder / "inception/inception-2015-12-05.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
