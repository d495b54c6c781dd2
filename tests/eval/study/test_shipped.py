"""The studies of configs/study, beside the training configs of the reference's six VAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import ConfigError
from eval.study.checks import allowed_keys
from eval.study.config import StudyConfig
from eval.study.study import Study
from train.checkpoints.identity import leaves
from train.config import TrainConfig

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/study").glob("*.yaml"))
OF_TRAINING = "options"  # a study of one VAE, whose entries have options of training of their own
OWN = {
    "data": {"also"},
    "ema": {"power", "snapshots"},
    "runs": True,
    "save_at": True,
    "init_from": True,
}  # of a study's run; averages are kept beside the training, and move none of its weights


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def training(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(exclude=OWN)  # type: ignore[arg-type]  # nested, as pydantic takes it


OF_VAES = [path for path in SHIPPED if path.stem != OF_TRAINING]


@pytest.mark.parametrize("path", OF_VAES, ids=lambda path: path.stem)
def test_each_entry_is_a_training_of_the_reference(path: Path) -> None:
    """An entry's name is that of the shipped training config of its VAE, which says the same."""
    study = Study.open(path)
    sizes = ("256", "512") if path.stem == "flux-512" else ("256",)
    for entry in study.entries:
        assert len(study.parts(entry)) == len(sizes)
        for phase, size in enumerate(sizes):
            shipped = configs.load(TrainConfig, ROOT / f"configs/train/{entry}-{size}.yaml")
            assert training(study.train_config(entry, 0, phase)) == training(shipped)
            assert set(study.train_config(entry, 0, phase).data.also) == {
                f"{other}-{size}" for other in study.entries
            }
    columns = {f"{entry}-{size}" for entry in study.entries for size in sizes}
    ((config, folders),) = study.encode_configs.values()  # a picture is decoded once for all
    assert set(config.columns) == columns
    assert len(folders) == 2 * len(columns)  # long and short captions


def test_the_shipped_studies() -> None:
    pairs = [{"flux", "flux-e2e"}, {"sd35", "sd35-e2e"}, {"qwen", "qwen-e2e"}]
    entries = {path.stem: set(Study.open(path).entries) for path in OF_VAES}
    assert entries == {
        "flux": pairs[0], "flux-512": pairs[0], "sd35": pairs[1], "qwen": pairs[2],
        "six-vaes": set.union(*pairs),
    }  # fmt: skip
    for path in SHIPPED:
        config = configs.load(StudyConfig, path)
        assert config.seeds == (0, 1, 2)
        for name, published in config.published.items():
            assert name.endswith("-e2e")
            assert published.better
            assert published.source.startswith("https://")


def test_entries_with_options_of_training_of_their_own() -> None:
    """Each differs from the baseline in the key that it names, and may."""
    study = Study.open(ROOT / f"configs/study/{OF_TRAINING}.yaml")
    baseline = leaves(training(study.train_config("flux", 0)))
    for entry, key in {
        "flux-latent": "flow.prediction",
        "flux-rate": "optim.lr",
        "flux-average": "ema.decay",
    }.items():
        own = leaves(training(study.train_config(entry, 0)))
        assert {name for name in baseline if own[name] != baseline[name]} == {key}
        assert allowed_keys(study, "flux", 0, entry, 0) == (key,)
    assert {column for _, columns in study.encode_configs.values() for column in columns} == {
        f"/data/blip3o/columns/{source}/flux-256" for source in ("blip3o-long", "blip3o-short")
    }  # encoded once for all


@pytest.mark.parametrize("name", ["flux", "flux-e3e"])
def test_what_is_published_is_of_an_entry_against_the_baseline(tmp_path: Path, name: str) -> None:
    values = yaml.safe_load((ROOT / "configs/study/flux.yaml").read_text())
    values["published"] = {name: {"better": True, "text": "x", "source": "y"}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ConfigError, match=f"published: found '{name}', expected an entry .*: flux-e2e"
    ):
        configs.load(StudyConfig, path)
