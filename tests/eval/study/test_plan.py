"""What `study plan` says, beside figures worked out by hand and those of `train plan`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import ConfigError
from eval.commands import main
from eval.errors import NoSpace
from eval.study.flags import generate_settings
from eval.study.graph import nodes_of
from eval.study.plan import cost
from eval.study.plan.cost import PICTURES, Assumptions, Costs, Files, NodeCost, files_of_run
from eval.study.plan.disk import refuse_if_full, rooms
from eval.study.plan.plan import plan_study
from eval.study.study import Study
from tests.train.conftest import CHANNELS, SIDE, TINY, columns, tiny_config  # noqa: F401
from train.model.flops import GPUS
from train.plan import make_plan

ROOT = Path(__file__).parents[3]
P = 2_660_490_816  # parameters of the reference's model
ROWS = 27.2e6 + 4.8e6
H100 = Assumptions(gpus=8, gpu=GPUS["h100"], price=2.0, samples=[27.2e6, 4.8e6])
PLAIN = replace(H100, samples=None)
SMALL: dict[str, Any] = {
    "data": {
        "latents": "/nowhere/toy/a", "text": "/nowhere/toy/text", "lanes": 8,
        "expect": {"channels": CHANNELS, "height": SIDE, "width": SIDE, "text_width": 12},
    },
    "model": TINY, "steps": 100, "global_batch": 16, "micro_batch": 4, "save_every": 10, "keep": 2,
}  # fmt: skip
SMALL_ENTRIES: dict[str, Any] = {"a": "/nowhere/toy/a", "b": "/nowhere/toy/b"}


def small(tmp_path: Path, train: dict[str, Any] = SMALL, **values: Any) -> Study:
    """A study of a tiny model, of entries `a` and `b` whose columns do not exist."""
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    study = {
        "train": str(tmp_path / "train.yaml"), "entries": SMALL_ENTRIES,
        "prompts": str(tmp_path / "prompts.txt"), "scorers": ["demo-acc"], "ranks": 1,
        "checkpoints": 1, "settle": None,
    }  # fmt: skip
    path = tmp_path / "fair.yaml"
    path.write_text(yaml.safe_dump(study | values))
    return Study.open(path, tmp_path / "out")


# The reference's -------------------------------------------------------------------------------------


def test_the_reference_without_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "plan.json"
    words = [
        "study", "plan", "configs/study/flux.yaml", "--out", str(tmp_path / "out"), "--gpu", "h100", "--gpus", "8",
        "--price", "2", "--samples", "27_200_000,4_800_000", "--tokens", "256", "--json", str(path),
    ]  # fmt: skip
    assert not main(words)
    out, record = " ".join(capsys.readouterr().out.split()), json.loads(path.read_text())
    # 1,081 GPU hours a training: test_the_reference_run_on_h100s
    assert record["train"]["gpu_hours"] == pytest.approx(6 * 1081, rel=2e-3)
    assert record["encode"]["gpu_hours"] == pytest.approx(
        2 * ROWS * 272.9e9 / (0.25 * 989e12) / 3600
    )
    assert record["encode"]["bytes"] == pytest.approx(2 * ROWS * 65_536, rel=0.03)
    # eight scored steps, three others and one being written, of eight fp32 values a parameter: two are of averages
    # whose snapshots, 64 of two fp16 values, are kept too, since a length is chosen
    assert record["files"]["scored_checkpoints"] == {"bytes": 6 * 8 * 32 * P, "each": 32 * P}
    assert record["files"]["other_checkpoints"]["bytes"] == 6 * 4 * 32 * P
    assert record["files"]["ema_snapshots"] == {"bytes": 6 * 64 * 4 * P, "each": 4 * P}
    assert record["train"]["bytes"] == 6 * (12 * 32 + 64 * 4) * P
    parts = [files["bytes"] for files in record["files"].values()]
    assert sum(parts) == pytest.approx(record["all"]["bytes"])
    assert record["pictures_a_set"] == 553 * 4
    # 1.00 TFLOP a pass at 256 tokens, of which prompts have few
    passes = 2 * 0.75e12 * 25 * 2212, 2 * 1.0e12 * 25 * 2212
    # 48 sets of all prompts, and nine of half of them for each of six trainings
    sampling = record["generate"]["gpu_hours"] * 3600 * 0.4 * 989e12 / (48 + 6 * 9 / 2)
    assert passes[0] < sampling < passes[1]
    assert record["all"]["price"] == pytest.approx(2 * record["all"]["gpu_hours"])
    assert record["all"]["to_make"] == record["all"]["nodes"] == 1 + 6 + (48 + 12) + (48 + 6 + 12)
    assert "2 entries x 3 seeds, scored at step 50,000, 69,475, 96,535, " in out
    assert "500,000, 2,212 pictures a set (geneval)" in out
    assert "no latent columns yet, so their sizes are assumed: flux-256, flux-e2e-256 (such" in out
    assert "does not make (`python -m encode run`): gemma-2b (such as /data" in out


def test_qwen_costs_more_to_encode_and_phases_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    hours = {}
    for name in ("flux", "qwen", "flux-512"):
        study = Study.open(Path(f"configs/study/{name}.yaml"), tmp_path)
        hours[name] = {
            kind: plan_study(study, H100).gpu_hours(kind)  # type: ignore[arg-type]  # a literal
            for kind in ("encode", "train")
        }
    assert hours["qwen"]["encode"] == pytest.approx((hours["flux"]["encode"] or 0) * 437.9 / 272.9)
    assert hours["flux-512"]["encode"] == pytest.approx(
        (hours["flux"]["encode"] or 0) * (272.9 + 1117.6) / 272.9
    )
    assert (hours["flux-512"]["train"] or 0) > 1.5 * (hours["flux"]["train"] or 0)


# In general ------------------------------------------------------------------------------------------


def test_a_large_study_plans_each_training_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 entries x 5 seeds x 10 checkpoints; columns of one shape are one training on paper. Flags, whose averages
    are checked at each step, are read once, not for each of 450 sets.
    """
    calls, readings = [], []

    def counted(*values: Any) -> Any:
        calls.append(values)
        return make_plan(*values)

    def settings(study: Study) -> dict[str, Any]:
        readings.append(study)
        return generate_settings(study)

    monkeypatch.setattr(cost, "make_plan", counted)
    monkeypatch.setattr(cost, "generate_settings", settings)
    entries = {f"vae{i}": f"/nowhere/toy/{i}" for i in range(8)}
    wide = {"latents": "/nowhere/toy/8", "with": ["model.mlp_size=96"]}
    study = small(tmp_path, entries=entries | {"wide": wide}, seeds=[*range(5)], checkpoints=10)
    plan = plan_study(study, PLAIN)
    counts = {kind: len(plan.to_make(kind)) for kind in ("train", "generate", "score")}  # type: ignore[arg-type]
    assert counts == {"train": 9 * 5, "generate": 9 * 5 * 10, "score": 9 * 5 * 10}
    assert len(calls) == 2
    assert len(readings) == 1


def test_what_exists_is_not_to_be_made(tmp_path: Path) -> None:
    study = small(tmp_path)
    everything = plan_study(study, PLAIN)
    made = {"train/a/seed0", "generate/a/seed0/step-00000100"}
    rest = plan_study(study, PLAIN, made)
    assert len(rest.to_make()) == len(everything.to_make()) - 2
    assert rest.gpu_hours("train") == pytest.approx((everything.gpu_hours("train") or 0) * 5 / 6)


def test_what_nodes_took_comes_before_what_is_assumed(tmp_path: Path) -> None:
    """Of the entry's own nodes, else of the others'; the longest, since one may have gone on from before."""
    longer = {"latents": "/nowhere/toy/c", "steps": 300}
    study = small(tmp_path, checkpoints=[100], entries=SMALL_ENTRIES | {"longer": longer})
    took = {"train/a/seed0": 360.0, "train/a/seed1": 720.0, "score/demo-acc/a/seed0/step-00000100": 36.0}  # fmt: skip
    costs = {c.node.id: c for c in Costs(study, Assumptions(), took).of(nodes_of(study))}
    assert costs["train/a/seed2"].gpu_hours == pytest.approx(0.2)
    assert costs["train/b/seed0"].gpu_hours == pytest.approx(0.2)
    assert costs["train/longer/seed0"].gpu_hours == pytest.approx(0.6)
    assert costs["score/demo-acc/b/seed1/step-00000100"].gpu_hours == 0.01
    assert costs["generate/a/seed0/step-00000100"].gpu_hours is None
    assert costs["train/a/seed2"].measured
    assert not costs["generate/a/seed0/step-00000100"].measured


def test_checkpoints_that_a_run_keeps(tmp_path: Path) -> None:
    study = small(tmp_path, checkpoints=[5, 50, 100])
    config = study.train_config("a", 0)
    assert config.save_at == (5, 50, 100)
    # steps 90 and 80, as keep: 2 says, and one more before 70 goes
    assert [*files_of_run(config).values()] == [3, 3, 0]
    seldom, alone = {"save_every": 1000}, {"save_at": ()}
    assert [*files_of_run(config.model_copy(update=seldom)).values()] == [3, 0, 0]
    assert [*files_of_run(config.model_copy(update=alone)).values()] == [0, 3, 0]
    averages = config.ema.model_copy(update={"power": (0.05, 0.1)})
    assert files_of_run(config.model_copy(update={"ema": averages}))["ema_snapshots"] == 32


def test_a_column_that_is_missing_is_taken_to_be_as_the_others(
    columns: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A VAE of one's own, against a column that exists; its rows are those of the other."""
    encode = {"root": str(columns), "sources": {"toy": str(tmp_path / "0.tar")}, "columns": {}}
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(encode))
    own = {"class": "AutoencoderKL", "path": "/models/own", "resolution": 64}
    entries = {
        "old": str(columns / "toy/vae"),
        "own": {"latents": str(columns / "toy/own"), "encoder": own},
    }
    study = small(
        tmp_path, tiny_config(columns, tmp_path), entries=entries, encode=str(tmp_path / "encode.yaml")
    )  # fmt: skip
    plan = plan_study(study, PLAIN)
    (encoding,) = plan.to_make("encode")
    assert encoding.bytes == pytest.approx(150 * 2 * 2 * CHANNELS * SIDE * SIDE, rel=0.03)
    flops = 150 * 272.9e9 * (64 / 256) ** 2
    assert encoding.gpu_hours == pytest.approx(flops / (0.25 * 989e12) / 3600)
    assert any("own: no column and no data.expect" in note for note in plan.notes)
    assert encoding.place == str(columns)


def test_neither_columns_nor_sizes(tmp_path: Path) -> None:
    train = SMALL | {"data": SMALL["data"] | {"expect": None}}
    where = r"give their sizes: data.expect.*=2048 \(those of a study in its `with`\)"
    with pytest.raises(ConfigError, match=where):
        plan_study(small(tmp_path, train), PLAIN)


def test_no_gpu_and_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path)
    assert not main(["study", "plan", str(tmp_path / "fair.yaml"), "--out", str(tmp_path)])
    assert (
        "time of train, generate, score unknown: give --gpu or --peak-tflops"
        in capsys.readouterr().out
    )


# Disk ------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path)
    costs = plan_study(study, Assumptions()).to_make()
    needed = sum(c.bytes for c in costs)
    (room,) = rooms(costs)
    assert (room.place, room.needed) == (str(tmp_path / "out"), needed)
    refuse_if_full(costs)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=int(needed) - 1))
    with pytest.raises(
        NoSpace, match=r"out: .* are free, expected .* for what is still to be made"
    ):
        refuse_if_full(costs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=int(needed) + 1))
    refuse_if_full(costs)


def test_two_places_of_one_disk_share_its_room(tmp_path: Path) -> None:
    node = nodes_of(small(tmp_path))[0]
    first = NodeCost(node, 1.0, False, (Files(PICTURES, 100, 50),), str(tmp_path / "a"))
    others = [replace(first, place=place) for place in (str(tmp_path / "b/c"), "s3://bucket/x")]
    disk, store = rooms([first, *others])
    assert disk.needed == 200
    assert (store.place, store.needed, store.free, store.fits) == ("s3://bucket/x", 100, None, None)
    assert "free space unknown" in store.verdict()
