"""The reference's config.json as it is really written, and configs that make no model."""

from typing import Any

import pytest

from configs import ConfigError
from train.model.config import BASES, DiTConfig, ModelConfig

BASE = {
    "model_type": "gemma", "_name_or_path": "google/gemma-2b", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "hidden_activation": "gelu",
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "attention_bias": True, "initializer_range": 0.01,
    "architectures": ["GemmaForCausalLM"], "torch_dtype": "bfloat16",
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "architectures": ["DiT"], "attention": "cross", "base_config": BASE, "dit_hidden_size": 1024,
    "dit_num_hidden_layers": 30, "in_channels": 4, "out_channels": 8, "initial_layers": 0, "model_type": "DiT",
    "patch_size": 4, "pos_embed": "m-rope", "pos_embed_max_size": 32, "qk_norm": True, "sample_size": 64,
    "sandwich_norm": True, "shared_attention_layers": "all", "text_hidden_size": 512, "text_hidden_states_index": -1,
    "text_modulation_embeds_dim": 96, "timestep_conditioning": "addition", "transformers_version": "4.43.3",
}  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    """FIELDS with other values, or without those that are `...`; of base_config where a name is there."""
    base, fields = dict(BASE), dict(FIELDS)
    for name, value in changes.items():
        part = base if name in BASE else fields
        part[name] = value
        if value is ...:
            del part[name]
    return {**fields, "base_config": base}


def test_every_field_arrives() -> None:
    assert DiTConfig.from_reference(FIELDS) == DiTConfig(
        hidden_size=1024, layers=30, heads=16, kv_heads=4, head_dim=128, mlp_size=8192, patch_size=4,
        attention="cross", pos_embed="m-rope", pos_embed_max_size=32, sample_size=64,
        timestep_conditioning="addition", qk_norm=True, sandwich_norm=True, attention_bias=True, activation="gelu",
        norm_eps=1e-5, rope_theta=500.0, initializer_range=0.01, in_channels=4, out_channels=8, text_width=512,
        text_modulation_width=96,
    )  # fmt: skip


def test_what_is_absent_or_null_has_its_default() -> None:
    names = [k for k in FIELDS if k not in ("base_config", "model_type", "timestep_conditioning")]
    rest = [k for k in BASE if k != "model_type"]
    absent = DiTConfig.from_reference({"base_config": {"model_type": "gemma"}})
    null = DiTConfig.from_reference(
        {**dict.fromkeys(names), "base_config": {"model_type": "gemma", **dict.fromkeys(rest)}}
    )
    assert absent == DiTConfig(
        hidden_size=3072, layers=18, heads=16, kv_heads=16, head_dim=256, mlp_size=24576, pos_embed="1d-rope",
        qk_norm=False, in_channels=16, out_channels=16, text_width=3072,
    )  # fmt: skip
    assert null.head_dim == 3072 // 16  # null: by arithmetic, as the reference fills it
    assert null == absent.model_copy(update={"head_dim": 192})
    assert DiTConfig.from_reference(changed(timestep_conditioning=None)).timestep_conditioning == "none"  # fmt: skip
    assert DiTConfig.from_reference(changed(dit_hidden_size=None)).hidden_size == 2048
    assert DiTConfig.from_reference(changed(text_hidden_size=...)).text_width == 2048
    assert DiTConfig.from_reference(changed(hidden_activation=None)).activation == "gelu_pytorch_tanh"  # fmt: skip
    assert DiTConfig.from_reference(changed(head_dim=..., model_type="llama")).head_dim == 128
    assert DiTConfig.from_reference(changed(rope_theta=..., rope_parameters={"rope_theta": 7.0}))


@pytest.mark.parametrize("kind", sorted(BASES))
def test_the_defaults_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    upstream = AutoConfig.for_model(kind)
    config = DiTConfig.from_reference({"base_config": {"model_type": kind}})
    assert config == DiTConfig.from_reference({"base_config": upstream.to_dict()})
    assert config.hidden_size == upstream.hidden_size
    assert (config.heads, config.kv_heads) == (upstream.num_attention_heads, upstream.num_key_value_heads)  # fmt: skip
    assert (config.head_dim, config.mlp_size) == (upstream.head_dim, upstream.intermediate_size)
    assert config.norm_eps == upstream.rms_norm_eps
    assert config.attention_bias == upstream.attention_bias
    assert config.initializer_range == upstream.initializer_range


def test_there_and_back() -> None:
    for fields in (FIELDS, changed(timestep_conditioning=None, text_modulation_embeds_dim=None)):
        config = DiTConfig.from_reference(fields)
        assert DiTConfig.from_reference(config.to_reference()) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention": "joint"}, "attention: found 'joint'.*self or cross"),
        ({"pos_embed": "3d-rope"}, "pos_embed: found '3d-rope'.*1d-rope"),
        ({"timestep_conditioning": "film"}, "timestep_conditioning: found 'film'"),
        ({"hidden_activation": "mish"}, "base_config.hidden_activation: found 'mish'"),
        ({"num_attention_heads": 6}, "heads 6 is no multiple of kv_heads 4"),
        ({"head_dim": 126}, "head_dim 126 is no multiple of 4"),
        ({"num_key_value_heads": ..., "model_type": "llama"}, "num_key_value_heads: found None"),
        ({"dit_num_hidden_layers": "many"}, "dit_num_hidden_layers: found 'many'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_model_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){named}"):
        DiTConfig.from_reference(changed(**changes))


def test_deep_fusion_and_a_missing_base_are_named() -> None:
    with pytest.raises(ConfigError, match="FuseDiT"):
        DiTConfig.from_reference({**FIELDS, "model_type": "FuseDiT"})
    with pytest.raises(ConfigError, match="base_config: found NoneType"):
        DiTConfig.from_reference({"attention": "self"})


def test_positions_that_do_not_fit_the_width() -> None:
    shape = {"layers": 1, "heads": 2, "kv_heads": 1, "mlp_size": 4}
    with pytest.raises(ValueError, match="hidden_size 30 is no multiple of 4"):
        ModelConfig.model_validate({**shape, "hidden_size": 30, "head_dim": 8})
    with pytest.raises(ValueError, match="sample_size 1 is less than patch_size 2"):
        ModelConfig.model_validate({**shape, "hidden_size": 8, "head_dim": 8, "sample_size": 1})
