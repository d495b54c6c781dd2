"""What is shipped in configs/encode: loads strictly, names the right tars, and makes its columns."""

import argparse
from pathlib import Path

import pytest

import configs
from encode.config import EncodeConfig
from encode.models.encoder import column_spec
from encode.models.load import load_encoder
from encode.plan.plan import make_plan
from encode.registry import TEXTS, VAES
from encode.source.places import expand
from shards import IndexRow, Source, open_store, put_index
from tests.encode.tiny_models import Models

FOLDER = Path(__file__).parents[2] / "configs/encode"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TARS = {"blip3o-long": 2697, "blip3o-short": 1833, "journeydb": 200}
FAMILY = {"AutoencoderKL": "flux", "AutoencoderKLQwenImage": "qwen", "GemmaModel": "gemma"}


def test_one_for_each_vae_of_the_study_and_size() -> None:
    vaes = [f"{vae}{kind}" for vae in ("flux", "sd35", "qwen") for kind in ("", "-e2e")]
    singles = {f"{vae}-{side}" for vae in vaes for side in (256, 512)}
    assert set(FILES) == singles | {"all-vaes", "gemma-2b"}
    every = configs.load(EncodeConfig, FOLDER / "all-vaes.yaml").columns
    for name in singles:
        assert configs.load(EncodeConfig, FOLDER / f"{name}.yaml").columns == {name: every[name]}
    assert every.keys() == singles


def test_the_tars_of_the_reference() -> None:
    config = configs.load(EncodeConfig, FOLDER / "flux-256.yaml")
    record = {name: expand(tars) for name, tars in config.sources.items()}
    assert {name: len(tars) for name, tars in record.items()} == TARS
    assert TARS["blip3o-long"] + TARS["blip3o-short"] == 4530
    for tars in record.values():
        assert len({Path(tar).name for tar in tars}) == len(tars)
    ends = [Path(record["blip3o-long"][i]).name for i in (0, 1000, 1099, -1)]
    assert ends == [
        "sa_000000.tar", "webdataset_JDB_1.tar", "webdataset_shard_000.tar",
        "webdataset_shard_1597.tar",
    ]  # fmt: skip


def test_places_are_overridden() -> None:
    config = configs.load(
        EncodeConfig, FOLDER / "gemma-2b.yaml",
        ["root=here", "sources.journeydb=null", "sources.blip3o-short=short/{0..2}.tar"],
    )  # fmt: skip
    assert config.root == "here"
    assert config.sources.keys() == {"blip3o-long", "blip3o-short"}
    assert len(expand(config.sources["blip3o-short"])) == 3


def small(name: str, tiny: Models, *words: str) -> EncodeConfig:
    """A shipped file with a tiny model of the class that the registry names in the real one's place."""
    encoders = []
    for column, config in configs.load(EncodeConfig, FOLDER / f"{name}.yaml").columns.items():
        assert isinstance(config.encoder, str)
        registered = {**VAES, **TEXTS}[config.encoder]
        assert registered.precision == "bf16-autocast"  # as the reference runs them
        own = tiny(FAMILY[registered.cls])
        assert own["class"] == registered.cls
        encoders.append(f"columns.{column}.encoder={{class: {own['class']}, path: {own['path']}}}")
    return configs.load(EncodeConfig, FOLDER / f"{name}.yaml", [*encoders, *words])


def with_index(place: Path, config: EncodeConfig) -> None:
    """Sources of tars that are nowhere, and the index of the middle one of each."""
    for name, patterns in config.sources.items():
        tars = tuple((Path(tar).name, 9_000_000) for tar in expand(patterns))
        source = Source(name, tars, config.shard_rows)
        folder = open_store(place / name)
        source.put(folder)
        row = {"jpg": (512, 8_000), "txt": (9_000, 84)}
        rows = [IndexRow(f"{i}", row, {}) for i in range(1024)]
        put_index(folder, source.fingerprint, len(tars) // 2, rows, None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("e2e" in name))  # of the same class
        for name in FILES
        if name != "all-vaes"  # the same ones
    ],
)
def test_columns_from_a_tiny_model_of_the_class(name: str, tiny: Models, tmp_path: Path) -> None:
    """Built, and planned against a synthetic index."""
    config = small(name, tiny, f"root={tmp_path}")
    with_index(tmp_path, config)
    options = argparse.Namespace(shards_sampled=1, seconds=0, global_batch=1024)
    estimate = make_plan(config, options)
    assert {source.source: source.tars for source in estimate.sources} == TARS
    ((column, keywords),) = config.columns.items()
    spec = column_spec(load_encoder(keywords, "cpu"), "fingerprint", 2697, config.shard_rows)
    if keywords.kind == "tokens":
        assert (spec.layout.row_shape, spec.empty_tokens) == ((256, 32), 1)
        row_bytes = 21 * 32 * 2.0  # 84 bytes of a caption are about 20 tokens, and one
    else:
        side = int(column.rpartition("-")[2])
        assert spec.layout.row_shape == (32, side // 8, side // 8)
        assert spec.norm is not None
        row_bytes = 32 * (side // 8) ** 2 * 2.0
    for cost in estimate.columns:
        assert cost.samples.value == pytest.approx(TARS[cost.source] * 1024)
        assert cost.bytes.value == pytest.approx(cost.samples.value * row_bytes, rel=0.02)
