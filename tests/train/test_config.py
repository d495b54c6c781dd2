"""How a config names its columns: places, or one word for all sources."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from configs import ConfigError, load
from tests.train.conftest import tiny_config
from train.__main__ import main
from train.config import DataConfig, DataShape, EmaConfig, TrainConfig, run_folder

MIXED = ["root=/cols", "sources={long: 0.6, short: 0.4}", "latents=flux", "text=gemma"]


def data(*words: str) -> DataConfig:
    return load(DataConfig, None, words)


def test_one_word_for_several_sources() -> None:
    config = data(*MIXED)
    result = config.resolved()
    assert result.latents == ("/cols/long/flux", "/cols/short/flux")
    assert result.text == ("/cols/long/gemma", "/cols/short/gemma")
    assert result.weights == (0.6, 0.4)
    assert result.sources is None
    assert result.resolved() == result
    assert config.first == ("/cols/long/flux", "/cols/long/gemma")
    assert config.source_names == ("long", "short")


def test_sources_in_other_ways() -> None:
    listed = data("sources=[s3://b/long, /x/short/]", "latents=flux", "text=gemma").resolved()
    assert listed.latents == ("s3://b/long/flux", "/x/short/flux")
    assert listed.weights is None
    weighed = data(
        "sources=[a, b]", "weights=[3, 1]", "latents=v", "text={t: 0.5, u: 0.5}"
    ).resolved()
    assert weighed.weights == (3, 1)
    assert weighed.text == ({"a/t": 0.5, "a/u": 0.5}, {"b/t": 0.5, "b/u": 0.5})
    single = data(*MIXED, "sources.short=null", "also=[sd35, /elsewhere/long/dino]").resolved()
    assert (single.latents, single.text, single.weights) == (
        "/cols/long/flux",
        "/cols/long/gemma",
        None,
    )
    assert single.also == ("/cols/long/sd35", "/elsewhere/long/dino")
    also = data(*MIXED, "also=[sd35]").resolved().also
    assert also == ("/cols/long/sd35", "/cols/short/sd35")


def test_folders_stand_for_themselves() -> None:
    """A config with sources takes `data.latents=DIR data.text=DIR` as any other."""
    result = data(*MIXED, "latents=cache/blip3o/flux", "text=s3://b/blip3o/gemma").resolved()
    assert result.latents == "cache/blip3o/flux"
    assert result.text == "s3://b/blip3o/gemma"
    assert (result.sources, result.weights) == (None, None)
    bare = data("latents=flux", "text=gemma")  # no sources: names of folders here
    assert bare.resolved() == bare


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latents=/cols/long/flux"], "/cols/long/flux is a folder or url, gemma the name"),
        (["latents=[flux, sd]", "text=[t, u]"], "one name for latents and one text expected"),
        (["weights=[1, 2]"], "says the shares already: remove data.weights"),
        (["sources={long: null}", "sources.short=null"], "names no source"),
        (["sources=[long, short]", "weights=[1]"], "1 weights for 2 sources"),
    ],
)
def test_what_does_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(*MIXED, *words)


def test_expected_sizes() -> None:
    sizes = "expect={channels: 4, height: 8, width: 8, text_width: 12}"
    config = data("latents=a", "text=b", sizes)
    assert config.expect == DataShape(4, 8, 8, 12)
    config.check(DataShape(4, 8, 8, 12))
    data("latents=a", "text=b").check(DataShape(1, 2, 3, 4))
    with pytest.raises(ConfigError, match=r"a and b: found channels 16, data.expect says 4; text_"):
        config.check(DataShape(16, 8, 8, 2))
    with pytest.raises(ConfigError, match="channel"):
        data("latents=a", "text=b", "expect={channel: 4, height: 8, width: 8, text_width: 12}")
    with pytest.raises(ConfigError, match="channels: found 0, expected a whole number from 1 on"):
        data("latents=a", "text=b", "expect={channels: 0, height: 8, width: 8, text_width: 12}")


def test_a_run_is_called_after_config_and_column(tmp_path: Path) -> None:
    values = tiny_config(tmp_path, tmp_path)
    values["data"] = {
        "root": "/c",
        "sources": ["long", "short"],
        "latents": "flux-256",
        "text": "t",
        "lanes": 8,
    }
    config = TrainConfig.model_validate(values)
    assert run_folder(config, Path("configs/flux-256.yaml")) == tmp_path / "flux-256"
    assert run_folder(config, Path("configs/dit1b.yaml")) == tmp_path / "dit1b-flux-256"


def test_help_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--help"], ["configs/demo/train.yaml", "-h"]):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        assert main() == 0
        assert "python -m train configs/train/cpu.yaml" in capsys.readouterr().out


def test_reading_processes_are_gone() -> None:
    """The config that a run of an earlier release left says `workers: 0`, which is as it is now."""
    values = {"latents": "a", "text": "b"}
    assert DataConfig.model_validate({**values, "workers": 0}) == DataConfig.model_validate(values)
    assert data("latents=a", "text=b", "workers=0") == data("latents=a", "text=b")
    with pytest.raises(ConfigError, match="found 4, but reading processes are gone.*Remove it"):
        data("latents=a", "text=b", "workers=4")


@pytest.mark.parametrize("lengths", [(0.1, 0.05), (0.1, 0.1), (0.1, 0.10000001)])
def test_lengths_of_averages_whose_files_would_have_one_name(lengths: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="the shorter one first, other in six digits"):
        EmaConfig(power=lengths)
    assert EmaConfig(power=(0.1, 0.10001)).power == (0.1, 0.10001)
