"""The DeepSpeed JSON: what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError
from train.config import TrainConfig
from train.engine import deepspeed_config

from .conftest import tiny_config


def config(tmp_path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(tiny_config(tmp_path, tmp_path, **changes))


def test_batch_numbers_come_from_the_run(tmp_path: Path) -> None:
    made = deepspeed_config(config(tmp_path), 2)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert made["gradient_accumulation_steps"] == 2
    assert made["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "contiguous_gradients": False,
    }


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "deepspeed.zero_optimisation: unknown key"),
        (
            {"zero_optimization": {"stage": 2, "overlap": True}},
            "zero_optimization.overlap: unknown",
        ),
        ({"zero_optimization": {"stage": 3}}, "stage: found 3, expected 1 or 2"),
        ({}, "stage: found None, expected 1 or 2"),
        ({"train_batch_size": 8}, "set global_batch instead"),
        ({"bf16": {"enabled": True}}, "torch_autocast"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, found: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(tmp_path, deepspeed=found), 1)


def test_a_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    with pytest.raises(ConfigError, match="found nothing at .*zero.json"):
        deepspeed_config(config(tmp_path, deepspeed=str(path)), 1)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert (
        deepspeed_config(config(tmp_path, deepspeed=str(path)), 1)["zero_optimization"]["stage"]
        == 2
    )


def test_impossible_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 cannot be cut into micro-batches of 4 on 3 ranks"):
        deepspeed_config(config(tmp_path), 3)
    with pytest.raises(ValueError, match="no multiple of data.lanes"):
        config(tmp_path, global_batch=12)
