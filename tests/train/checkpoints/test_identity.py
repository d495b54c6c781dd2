"""What a run is for a comparison: read from real checkpoints, and which differences belong to the VAE."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards import ColumnSpec, Layout, Norm, ShardWriter, create_column, put_complete, seal
from shards.format.layout import ZARR_ROWS
from shards.tools.convert import convert
from tests.train.conftest import SIDE, TINY, tiny_config
from tests.train.here import fitted, manifest, trained
from train.checkpoints.identity import (
    PARTS,
    compared,
    differing,
    initial_share,
    leaves,
    precision,
    training_of,
    without_seed,
)
from train.checkpoints.reference import export
from train.config import TrainConfig, run_folder
from train.step.ema import Ema


@pytest.fixture(scope="module")
def cache(columns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source `toy`, and there another VAE of six channels, which failed at one of the 150 rows."""
    folder = tmp_path_factory.mktemp("identity") / "toy"
    shutil.copytree(columns / "toy", folder)
    spec = ColumnSpec(
        {"source": "toy", "encoder": "other"},
        Layout("moments", (12, SIDE, SIDE), 1),
        Norm((0.2,), (0.5,)),
    )
    digest = create_column(folder / "other", spec)
    writer = ShardWriter(folder / "other", spec, digest, 0, 150, "index")
    moments = np.random.default_rng(0).standard_normal((150, 12, SIDE, SIDE)).astype(np.float16)
    status = np.zeros(150, np.uint8)
    status[7] = 1
    for start in range(0, 150, ZARR_ROWS):
        writer.put_block(moments[start : start + ZARR_ROWS], status[start : start + ZARR_ROWS])
    writer.commit({})
    put_complete(folder / "other", digest, 1, allow_failed=True)
    return folder.parent


def config(cache: Path, runs: Path, latents: str = "vae", **changes: Any) -> dict[str, Any]:
    result = tiny_config(cache, runs, **{"steps": 2, **changes})
    also = [str(cache / "toy" / name) for name in ("vae", "other")]
    return {
        **result,
        "data": {**result["data"], "latents": str(cache / "toy" / latents), "also": also},
    }


@pytest.fixture(scope="module")
def base(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return training_of(manifest(trained(config(cache, tmp_path_factory.mktemp("base"))), 2))


def test_only_what_follows_the_vae_differs(
    cache: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    training = training_of(manifest(trained(config(cache, tmp_path, "other")), 2))
    assert set(base) >= set(PARTS)
    result = compared(base, training)
    assert (result.beside, result.unknown) == ({}, ())
    assert result.follow["model.in_channels"] == (4, 6)
    assert result.follow["data.sources.0.latents.encoder"] == ("toy", "other")
    assert "data.sources.0.latents.norm.shift" in result.follow
    assert compared(base, base).all == {}


def test_everything_else_is_beside_it(cache: Path, base: dict[str, Any], tmp_path: Path) -> None:
    """Other layers, rate, decay, batch, steps, seed, lanes, dropped captions and rows, in one real run."""
    changed = config(
        cache,
        tmp_path,
        "other",
        model={**TINY, "layers": 1},
        optim={"lr": 1e-5},
        seed=7,
        steps=3,
        ema={"decay": 0.5},
        global_batch=32,
        flow={"weighting": "mode"},
    )
    changed["data"] |= {"also": [], "caption_dropout": 0.0, "lanes": 16, "window": 16}
    changed["data"]["latents"] = str(cache / "toy/vae")
    result = compared(base, training_of(manifest(trained(changed), 3)))
    assert result.beside.keys() >= {
        "model.layers",
        "optim.lr",
        "seed",
        "step",
        "position",
        "ema.decay",
        "global_batch",
        "flow.weighting",
        "caption_dropout",
        "order.lanes",
        "order.window",
        "order.valid_rows",
    }
    assert result.beside["model.layers"] == (2, 1)
    assert result.beside["optim.lr"] == (3e-3, 1e-5)
    assert result.follow == {}


def test_columns_that_leave_the_rows_as_they_are_make_no_difference(base: dict[str, Any]) -> None:
    data = {key: dict(value) for key, value in base["data"]["sources"][0].items()}
    sources = [{k: v for k, v in data.items() if k != "also.1"}]
    training = {**base, "data": {**base["data"], "sources": sources}}
    assert compared(base, training).all == {}
    fewer = {**training, "order": {**base["order"], "valid_rows": ["0" * 64]}}
    assert {key.partition(".also")[0] for key in compared(base, fewer).beside} == {
        "order.valid_rows",
        "data.sources.0",
    }


def test_a_patch_of_another_size_follows_only_where_the_tokens_are_as_many(
    base: dict[str, Any],
) -> None:
    def at(patch: int, tokens: int) -> dict[str, Any]:
        sizes = {"patch_size": patch, "pos_embed": "2d-rope"}  # which has no table of places
        return {**base, "model": {**base["model"], **sizes}, "tokens": tokens}

    assert compared(at(2, 16), at(1, 16)).follow == {"model.patch_size": (2, 1)}
    assert compared(at(2, 16), at(1, 64)).beside == {"model.patch_size": (2, 1)}
    assert compared(at(2, 16), at(2, 64)).follow == {"tokens": (16, 64)}


@pytest.mark.parametrize(
    ("sides", "paired"), [((32, 16), True), ((32, 32), False), ((8, 4), True), ((8, 3), False)]
)
def test_patches_follow_where_the_tokens_have_the_same_places(
    base: dict[str, Any], sides: tuple[int, int], paired: bool
) -> None:
    """A VAE that shrinks twice as much, with patches half as large: the table of places must be the same, too."""
    first, second = (
        {**base, "model": {**base["model"], "patch_size": patch, "sample_size": side}, "tokens": 16}
        for patch, side in zip((2, 1), sides, strict=True)
    )
    result = compared(first, second)
    keys = {"model.patch_size"} | ({"model.sample_size"} if sides[0] != sides[1] else set())
    assert (result.follow if paired else result.beside).keys() == keys
    assert not (result.beside if paired else result.follow)


@pytest.mark.parametrize(("table", "paired"), [(16, True), (64, False)])
def test_a_table_of_positions_that_was_left_out_follows_the_latent(
    base: dict[str, Any], table: int, paired: bool
) -> None:
    """A VAE of half as many places a side: 8 x 8 and 4 x 4 tokens."""
    sizes = {"patch_size": 2, "pos_embed": "ape"}
    first, second = (
        {**base, "model": {**base["model"], **sizes, "sample_size": side, **size}, "tokens": tokens}
        for side, size, tokens in (
            (16, {"pos_embed_max_size": 32}, 64),
            (8, {"pos_embed_max_size": table}, 16),
        )
    )
    result = compared(first, second)
    keys = {"model.pos_embed_max_size", "model.sample_size"}
    assert (result.follow if paired else result.beside).keys() >= keys
    assert not paired or not result.beside


def test_a_shift_follows_where_each_run_has_that_of_its_latent(base: dict[str, Any]) -> None:
    """FLUX's 16 x 32 x 32 and DC-AE's 32 x 8 x 8: sqrt(16384 / 4096) and sqrt(2048 / 4096); also in the runs that they
    went on from."""

    def at(shift: float, channels: int, patch: int, tokens: int) -> dict[str, Any]:
        model = {
            **base["model"],
            "in_channels": channels,
            "out_channels": channels,
            "patch_size": patch,
        }
        return {**base, "model": model, "tokens": tokens, "flow": {**base["flow"], "shift": shift}}

    flux, dcae = at(2.0, 16, 2, 256), at(0.5**0.5, 32, 2, 16)
    assert compared(flux, dcae).beside == {}
    assert compared(flux, dcae).follow["flow.shift"] == (2.0, 0.5**0.5)
    assert compared(flux, at(3.0, 32, 2, 16)).beside == {"flow.shift": (2.0, 3.0)}
    assert compared(at(3.0, 16, 2, 256), dcae).beside == {"flow.shift": (3.0, 0.5**0.5)}
    assert compared(at(3.0, 16, 2, 256), at(3.0, 32, 2, 16)).beside == {}
    later = [{**run, "init": {"path": "x", "sha256": "0", "training": run}} for run in (flux, dcae)]
    assert compared(*later).beside == {}
    assert compared(*later).follow["init.training.flow.shift"] == (2.0, 0.5**0.5)
    third = {**dcae, "init": {"path": "x", "sha256": "0", "training": at(3.0, 32, 2, 16)}}
    assert compared(later[0], third).beside == {"init.training.flow.shift": (2.0, 3.0)}


@pytest.mark.parametrize(
    ("sizes", "beside"),
    [
        ({"sample_size": (32, 8)}, set()),  # `auto` without sizes: 256 and 64 tokens, tables of 64 and 32
        ({"sample_size": (32, 16), "pos_embed_max_size": (64, 64)}, set()),  # and of a config with sizes
        ({"sample_size": (32, 32), "pos_embed_max_size": (64, 64)}, {"model.patch_size"}),  # without auto
        ({"sample_size": (32, 8), "patch_size": (4, 1)}, set()),  # of 64 tokens, equal
        ({"sample_size": (32, 8), "patch_size": (1, 2)}, {"model.patch_size"}),  # of no number of tokens
    ],
)  # fmt: skip
def test_patches_follow_where_auto_takes_both(
    base: dict[str, Any], sizes: dict[str, tuple[int, int]], beside: set[str]
) -> None:
    """FLUX's 32 x 32 with patches of 2, HunyuanImage's 8 x 8 with patches of 1: tokens of both as many as there can be
    up to 256."""
    runs = []
    for i, side in enumerate((32, 8)):
        model = {**base["model"], "pos_embed": "ape", "patch_size": 2 - i}
        model |= {key: values[i] for key, values in sizes.items()}
        tokens = (side // model["patch_size"]) ** 2
        if "pos_embed_max_size" not in sizes:
            model["pos_embed_max_size"] = min(4 * side // model["patch_size"], 64)
        runs.append({**base, "model": model, "tokens": tokens})
    result = compared(*runs)
    assert result.beside.keys() == beside
    assert "model.patch_size" in result.all
    later = [{**run, "init": {"path": "x", "sha256": "0", "training": run}} for run in runs]
    nested = {f"init.training.{key}" for key in beside}
    assert compared(*later).beside.keys() == beside | nested


def test_where_columns_lie_and_how_they_are_stored_makes_no_difference(
    base: dict[str, Any],
) -> None:
    """The same weights under another path, another digest of the column (its layout), and `also` in another order."""

    def at(
        path: str, digest: str, also: tuple[str, ...], precision: str = "fp32"
    ) -> dict[str, Any]:
        encoder = {
            "class": "C", "path": path, "subfolder": None, "revision": None, "precision": precision, "weights": "a" * 64
        }  # fmt: skip
        source = {
            name: {"encoder": encoder, "digest": digest}
            for name in ("latents", "text", *(f"also.{i}" for i in range(len(also))))
        } | {f"also.{i}": {"encoder": value} for i, value in enumerate(also)}
        result = {
            **base,
            "data": {"truncated": False, "sources": [source], "text_encoder": encoder},
        }
        return {**result, "init": {"path": path, "sha256": digest * 64, "training": result}}

    first, second = at("vae", "1", ("x", "y")), at("/models/vae", "2", ("y",))
    assert compared(first, second).all == {}
    assert without_seed(first) == without_seed({**second, "seed": 9})
    autocast = at("vae", "1", ("x", "y"), "bf16-autocast")
    assert "data.sources.0.latents.encoder.precision" in compared(first, autocast).beside


def test_runs_on_copies_of_their_columns_are_the_same_training(
    cache: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    copied = tmp_path / "moved/toy"
    copied.mkdir(parents=True)
    for name in ("vae", "text", "other"):
        convert(cache / "toy" / name, copied / name, backend="webdataset")
    run = trained(config(copied.parent, tmp_path, seed=1))
    copy = training_of(manifest(run, 2))
    assert copy["data"] != base["data"]
    assert compared(base, copy).all == {"seed": (0, 1)}
    assert without_seed(base) == without_seed(copy)


def test_fields_that_an_older_version_did_not_have_are_no_difference(base: dict[str, Any]) -> None:
    for part, key in (("optim", "warmup"), ("flow", "precondition"), ("model", "qk_norm")):
        older = {**base, part: {k: v for k, v in base[part].items() if k != key}}
        assert compared(older, base).all == {}
    newer = {**base, "flow": {**base["flow"], "brand_new": 3}}
    assert compared(base, newer).beside == {"flow.brand_new": (None, 3)}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_said_is_unknown(base: dict[str, Any], part: str) -> None:
    result = compared({k: v for k, v in base.items() if k != part}, base)
    assert (result.unknown, result.all) == ((part,), {})


def test_imported_weights_say_nothing_of_their_training() -> None:
    result = training_of({"step": 5, "model": {"layers": 2}, "files": {}})
    assert result == {"step": 5, "model": {"layers": 2}}
    assert initial_share({"step": 5, "model": {}}) is None


def test_runs_of_two_seeds_differ_in_the_seed_alone(
    cache: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    run = trained(config(cache, tmp_path, seed=1))
    assert run.name == "tiny-vae-seed1"
    training = training_of(manifest(run, 2))
    assert compared(base, training).all == {"seed": (0, 1)}
    assert without_seed(base) == without_seed(training)


def test_seeds_alone(base: dict[str, Any]) -> None:
    """Also where each seed went on from a run of the same seed."""
    first, second = ({**base, "seed": seed} for seed in (0, 1))
    assert without_seed(first) == without_seed(second)
    assert compared(first, second).all == {"seed": (0, 1)}
    assert without_seed({**first, "step": 9}) != without_seed(second)
    later = [
        {
            **run,
            "init": {
                "path": f"/runs/{i}",
                "sha256": str(i) * 64,
                "file": "ema.safetensors",
                "step": 2,
                "training": run,
            },
        }
        for i, run in enumerate((first, second))
    ]
    assert without_seed(later[0]) == without_seed(later[1])
    unknown = [
        {**run, "init": {k: v for k, v in run["init"].items() if k != "training"}} for run in later
    ]
    assert without_seed(unknown[0]) != without_seed(unknown[1])


def test_a_run_begun_from_another_says_what_that_was(cache: Path, tmp_path: Path) -> None:
    """The VAE follows there too, what else differs there is named."""
    trainings = []
    for name, lr in (("vae", 3e-3), ("other", 1e-3)):
        first = trained(config(cache, tmp_path / name / "first", name, optim={"lr": lr}))
        second = trained(config(cache, tmp_path / name / "second", name, init_from=str(first)))
        trainings.append(training_of(manifest(second, 2)))
    result = compared(*trainings)
    assert result.beside == {"init.training.optim.lr": (3e-3, 1e-3)}
    assert "init.training.model.in_channels" in result.follow


def test_a_config_that_changed_on_the_way_is_remembered(
    cache: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    """Half of the steps at another rate make another training, though the last config is the same."""
    run = trained(config(cache, tmp_path, steps=1, optim={"lr": 1e-4}, ema={"decay": 0.5}))
    assert "changes" not in manifest(run, 1)
    assert trained(config(cache, tmp_path)) == run
    record = manifest(run, 2)
    assert record["changes"] == [{"step": 1, "ema.decay": [0.5, 0.9], "optim.lr": [1e-4, 3e-3]}]
    assert compared(training_of(record), base).beside["changes.0.step"] == (1, None)
    assert record["average"]["initial_share"] == pytest.approx(0.5 * 0.9)
    trained(config(cache, tmp_path, steps=3))
    assert manifest(run, 3)["changes"] == record["changes"]  # more steps move no constant rate
    for steps in (4, 5):
        trained(config(cache, tmp_path, steps=steps, optim={"lr": 3e-3, "schedule": "cosine"}))
    first, second, last = manifest(run, 5)["changes"]
    assert [first] == record["changes"]
    assert second == {
        "step": 3,
        "optim.schedule": ["constant", "cosine"],
        "steps_planned": [None, 4],
    }
    assert last == {"step": 4, "steps_planned": [4, 5]}


def test_a_deepspeed_file_counts_by_what_it_said(cache: Path, tmp_path: Path) -> None:
    """The same path with other words in it is another training; another stage is not."""
    path = tmp_path / "zero.json"
    trainings = []
    stage = {"zero_optimization": {"stage": 1}}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for i, settings in enumerate((stage, stage | autocast, {"zero_optimization": {"stage": 2}})):
        path.write_text(json.dumps(settings))
        values = config(cache, tmp_path / str(i), steps=1, deepspeed=str(path))
        trainings.append(training_of(manifest(trained(values), 1)))
    differ = compared(trainings[0], trainings[1]).beside
    assert differ["deepspeed.torch_autocast.dtype"] == (None, "bfloat16")
    assert compared(trainings[0], trainings[2]).all == {}
    assert precision({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}) == {}
    run = tmp_path / "0/tiny-vae"
    path.write_text(json.dumps(stage | autocast))
    trained(config(cache, tmp_path / "0", steps=2, deepspeed=str(path)))
    (change,) = manifest(run, 2)["changes"]
    assert change["deepspeed.torch_autocast.enabled"] == [None, True]


# The average ---------------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.99999), st.integers(0, 400))
def test_the_initial_share_is_the_product_of_the_decays(decay: float, updates: int) -> None:
    """Closed form: weights that start at 1 and are 0 from the first update on leave the share in the average."""
    ema = Ema([torch.ones(1, dtype=torch.float64)], decay)
    for _ in range(updates):
        ema.update([torch.zeros(1, dtype=torch.float64)])
    assert ema.initial_share == pytest.approx(decay**updates, rel=1e-9, abs=1e-300)
    assert ema.parts[0].item() == pytest.approx(ema.initial_share, rel=1e-6, abs=1e-12)
    old = {"config": {"ema": {"decay": decay}}, "optimizer": {"step": updates}}
    assert initial_share(old) == pytest.approx(ema.initial_share, rel=1e-9, abs=1e-300)
    assert initial_share({**old, "average": {"initial_share": 0.25}}) == 0.25


def test_a_young_average_is_said(cache: Path, columns: Path, tmp_path: Path) -> None:
    """In the line of validation, in the metrics, in the checkpoint and on the run's page."""
    values = config(
        cache,
        tmp_path,
        ema={"decay": 0.99},
        validation={"source": str(columns / "toy-val"), "every": 1, "rows": 4},
    )
    code, output, run = fitted(values)
    assert code == 0, output
    assert "98.0% initial weights in the average" in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [r["validation"]["initial_share"] for r in lines if "validation" in r]
    assert shares == pytest.approx([0.99, 0.9801])
    assert [r["initial_share"] for r in lines if "loss" in r][-1] == pytest.approx(0.9801)
    assert manifest(run, 2)["average"]["initial_share"] == pytest.approx(0.9801)
    assert "98.0% of it are the initial weights" in (run / "page.html").read_text()


def test_a_resumed_average_goes_on_from_checkpoints_that_do_not_say_it(
    cache: Path, tmp_path: Path
) -> None:
    run = trained(config(cache, tmp_path, ema={"decay": 0.5}))
    path = run / "checkpoints/step-00000002/manifest.json"
    record = json.loads(path.read_bytes())
    for key in ("average", "latent_shape", "deepspeed", "digest"):
        del record[key]
    path.write_bytes(seal(record))
    trained(config(cache, tmp_path, ema={"decay": 0.5}, steps=3))
    assert manifest(run, 3)["average"]["initial_share"] == 0.125
    assert "changes" not in manifest(run, 3)


def test_a_young_average_is_no_good_start_either(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`init_from` and `export` take the average too."""
    run = trained(config(cache, tmp_path, ema={"decay": 0.99}))
    for init_ema, warned in ((True, True), (False, False)):
        values = config(cache, tmp_path / str(init_ema), init_from=str(run), init_ema=init_ema)
        code, output, _ = fitted(values)
        assert code == 0, output
        assert ("98.0% of the averaged weights" in output) is warned
    step = run / "checkpoints/step-00000002"
    export(step, tmp_path / "weights", "diffusers", ema=False)
    assert not caplog.records
    export(step, tmp_path / "average", "diffusers")
    assert "98.0% of the averaged weights" in caplog.text


# Folders -------------------------------------------------------------------------------------------------------------


def test_seeds_do_not_share_a_folder(cache: Path, tmp_path: Path) -> None:
    def folder(seed: int) -> str:
        checked = TrainConfig.model_validate(config(cache, tmp_path, seed=seed))
        return run_folder(checked, Path("dit.yaml")).name

    assert [folder(seed) for seed in (0, 1, 12)] == ["dit-vae", "dit-vae-seed1", "dit-vae-seed12"]
    (tmp_path / "dit-vae").mkdir()
    (tmp_path / "dit-vae/config.yaml").write_text("seed: 12\n")  # as it was named before
    assert [folder(seed) for seed in (0, 1, 12)] == ["dit-vae", "dit-vae-seed1", "dit-vae"]
    (tmp_path / "dit-vae-seed12").mkdir()
    assert folder(12) == "dit-vae-seed12"
    for damaged in ("seed", "[", "seed: x", ""):
        (tmp_path / "dit-vae/config.yaml").write_text(damaged)
        assert folder(1) == "dit-vae-seed1"


@given(
    st.recursive(
        st.integers() | st.text(max_size=2),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
        ),
    )
)
def test_a_value_does_not_differ_from_itself(value: Any) -> None:
    assert differing(value, value) == {}
    assert differing({"x": value}, {"x": value, "y": 1}) == {"y": (None, 1)}
    assert leaves(1, "x") == {"x": 1}
