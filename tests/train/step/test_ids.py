"""A column of token ids as the text: an encoder that is handed in makes in the step what a tokens column holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import ConfigError
from shards import Column, ColumnSpec, IdentityMismatch, Layout
from tests.train.conftest import TOKENS, WIDTH, tiny_config, words, write_column
from tests.train.here import fitted, losses, manifest, step_folder, trained
from train.config import TrainConfig
from train.loop import CHECKPOINTS
from train.run import check_text_encoder, expected_record, open_columns, shape_of

VOCABULARY = 40
HOW = {"tokenizer": "digest", "max_tokens": TOKENS}


class Table:
    """An embedding table as a text encoder. A token also holds the length of its caption, so that a wrong
    cu_seqlens shows."""

    def __init__(self, weights: str = "table", **how: Any) -> None:
        g = torch.Generator().manual_seed(5)
        self.table = torch.randn(VOCABULARY, WIDTH, generator=g).bfloat16()
        self.identity = {
            "kind": "tokens", "encoder": {"weights": weights},
            "preprocess": {**HOW, "hidden_state": -1, **how},
        }  # fmt: skip

    def __call__(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        assert ids.dtype == torch.int32
        lengths = cu_seqlens.diff()
        tokens = self.table[ids.long()]
        tokens[:, 0] = torch.repeat_interleave(lengths, lengths).bfloat16()
        return tokens


def write_texts(folder: Path, captions: list[list[int]], empty: list[int], source: str) -> None:
    """`folder/ids`, and `folder/text` with what `Table` makes of them."""
    identity = {"kind": "ids", "source": source, "encoder": "tokenizer", "preprocess": HOW}
    spec = ColumnSpec(identity, Layout("ids", (TOKENS,), 1), None, len(empty))
    values = [np.array(ids, np.int32) for ids in captions]
    write_column(folder / "ids", spec, values, np.array(empty, np.int32))

    def tokens(ids: list[int]) -> Any:
        return words(Table()(torch.tensor(ids, dtype=torch.int32), torch.tensor([0, len(ids)])))

    identity = {"source": source, "encoder": "text"}
    spec = ColumnSpec(identity, Layout("tokens", (TOKENS, WIDTH), 1), None, len(empty))
    write_column(folder / "text", spec, [tokens(ids) for ids in captions], tokens(empty))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, columns: Path) -> Path:
    """Sources `toy` and `toy-val` with ids and tokens of the same captions; every fifth has none."""
    folder = tmp_path_factory.mktemp("cache")
    for name, rows, seed in (("toy", 150, 0), ("toy-val", 20, 1)):
        (folder / name).mkdir()
        (folder / name / "vae").symlink_to(columns / name / "vae")
        generator = np.random.default_rng(seed)
        captions = [
            generator.integers(0, VOCABULARY, generator.integers(1, TOKENS + 1) if row % 5 else 0).tolist()
            for row in range(rows)
        ]  # fmt: skip
        write_texts(folder / name, captions, [7, 3], name)
    return folder


def config_of(folder: Path, runs: Path, text: str, **changes: Any) -> dict[str, Any]:
    values = tiny_config(folder, runs, **{"steps": 3, "optim": {"lr": 0.05}, **changes})
    data = {**values["data"], "text": str(folder / "toy" / text), "caption_dropout": 0.3}
    # ids say nothing to a linear model, tokens do
    held_out = {"source": str(folder / "toy-val"), "rows": 20, "batch": 8, "reference": False}
    return {**values, "data": data, "validation": held_out}


def validations(run: Path) -> list[dict[str, Any]]:
    result = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{**r["validation"], "seconds": 0} for r in result if "validation" in r]


def opened(folder: Path, text: str) -> Any:
    return open_columns(TrainConfig.model_validate(config_of(folder, folder, text)), None)


@pytest.fixture(scope="module")
def on_ids(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config_of(cache, tmp_path_factory.mktemp("on-ids"), "ids"), text_encoder=Table())


def test_it_trains_as_on_the_tokens(cache: Path, on_ids: Path, tmp_path: Path) -> None:
    """Dropped captions, validation, and captions without a token included: to the last bit."""
    tokens = trained(config_of(cache, tmp_path, "text"))
    assert losses(on_ids) == losses(tokens)
    assert len(set(losses(on_ids).values())) == 3
    first, second = (validations(run)[-1] for run in (on_ids, tokens))
    assert first == second
    assert first["loss"] > 0
    for name in ("weights", "ema"):
        first, second = (
            load_file(step_folder(run, 3) / f"{name}.safetensors") for run in (on_ids, tokens)
        )
        assert all(torch.equal(first[k], second[k]) for k in second)
    assert manifest(on_ids, 3)["model"]["text_width"] == WIDTH


def test_the_text_reaches_the_model(cache: Path, on_ids: Path, tmp_path: Path) -> None:
    """What the last test compares could be two runs that never look at the text."""
    encoder = Table()
    encoder.table = encoder.table.flip(0)
    control = trained(config_of(cache, tmp_path, "ids"), text_encoder=encoder)
    assert losses(control)[3] != losses(on_ids)[3]


def test_the_encoder_is_part_of_the_run(cache: Path, on_ids: Path) -> None:
    assert manifest(on_ids, 3)["data"]["text_encoder"] == Table().identity
    config = config_of(cache, on_ids.parent, "ids", steps=4)
    code, output, run = fitted(config, text_encoder=Table("others"))
    assert (code, run) == (2, on_ids)
    assert "data.text_encoder.encoder.weights: found 'table', expected 'others'" in output
    assert f"init_from={step_folder(run, 3)}" in output
    trained(config, text_encoder=Table())
    assert losses(on_ids).keys() == {1, 2, 3, 4}


def test_what_a_run_from_these_weights_would_record(cache: Path, on_ids: Path) -> None:
    """Without the encoder, of whose width the weights tell."""
    values = config_of(cache, on_ids.parent, "ids", init_from=str(step_folder(on_ids, 3)))
    record = expected_record(TrainConfig.model_validate(values))
    weights = manifest(on_ids, 3)["files"]["ema.safetensors"]
    assert record["init"]["sha256"] == weights["sha256"]
    assert "text_width" not in record["model"]


def test_an_encoder_is_needed_for_ids_and_for_nothing_else(cache: Path, tmp_path: Path) -> None:
    code, output, run = fitted(config_of(cache, tmp_path, "ids"))
    assert code == 2
    assert "toy/ids: found a column of ids, on which a text encoder has to run" in output
    assert "torchrun -m eval train" in output
    assert not run.exists()
    with pytest.raises(ConfigError, match="a column of tokens, and a text encoder"):
        check_text_encoder(opened(cache, "text"), Table())


def test_the_encoder_must_cut_captions_as_the_column_does(cache: Path) -> None:
    sources = opened(cache, "ids")
    check_text_encoder(
        sources, Table(caption="short.txt")
    )  # which caption it is, is the column's affair
    check_text_encoder(sources, lambda ids, cu_seqlens: ids)  # one that does not say who it is
    with pytest.raises(IdentityMismatch, match="tokenizer: found 'another', expected 'digest'"):
        check_text_encoder(sources, Table(tokenizer="another"))
    with pytest.raises(IdentityMismatch, match="instruction: found 'Draw', expected None"):
        check_text_encoder(sources, Table(instruction="Draw"))


def test_the_width_is_what_the_encoder_makes(cache: Path) -> None:
    sources = opened(cache, "ids")
    assert sources.text_width is None
    assert (
        shape_of(sources, Table()).text_width == WIDTH == shape_of(opened(cache, "text")).text_width
    )
    with pytest.raises(ConfigError, match=r"made \(2,\) of 2 ids, expected \(2, width\)"):
        shape_of(sources, lambda ids, cu_seqlens: ids)


def test_captions_of_no_token_alone(cache: Path, tmp_path: Path) -> None:
    """Every micro-batch, and the validation, of captions that have none."""
    for name, rows in (("toy", 150), ("toy-val", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vae").symlink_to((cache / name / "vae").resolve())
        write_texts(tmp_path / name, [[]] * rows, [7], name)
    assert Column.open(tmp_path / "toy/ids").lengths(np.arange(9)).sum() == 0
    result = []
    for text, encoder in (("ids", Table()), ("text", None)):
        config = config_of(tmp_path, tmp_path / text, text)
        config["data"]["caption_dropout"] = 0.0
        run = trained(config, text_encoder=encoder)
        assert (run / CHECKPOINTS).is_dir()
        result.append(losses(run))
    assert result[0] == result[1]
