"""A study of latents of other sizes: what follows them under `auto` is no difference, anything else is one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from configs import ConfigError
from eval.errors import BadStudy, NotPaired
from eval.study.checks import check_columns, refuse_unpaired
from eval.study.earlier import take_over
from eval.study.pictures import reported_set
from eval.study.reuse import Existing
from eval.study.study import Study
from shards import Column, ColumnSpec, Layout, Norm
from tests.encode.tiny_models import save_dc, save_hunyuan, save_rae, saved
from tests.eval.study.small_study import SIDE, study_yaml, write_inputs
from tests.eval.study.small_study import study as run_study
from tests.train.conftest import tiny_config, words, write_column
from tests.train.here import forked
from train.checkpoints.identity import compared
from train.run import expected_record, fit

WIDTH = 8
SHAPES = {"flux": (16, 8, 8), "rae": (48, 4, 4), "hunyuan": (64, 2, 2)}  # a quarter of their sides
MODEL = {"hidden_size": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_size": 16}
AUTO = {**MODEL, "patch_size": "auto", "image_tokens": 16}


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    g = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = g.standard_normal((16, *shape)).astype(np.float16)
        identity = {"source": "s", "encoder": name}
        spec = ColumnSpec(identity, Layout("latents", shape, 1), Norm((0.0,), (1.0,)))
        write_column(folder / name, spec, values)
    spec = ColumnSpec({"source": "s", "encoder": "text"}, Layout("tokens", (1, WIDTH), 1), None, 1)
    captions = [words(torch.randn(1, WIDTH)) for _ in range(16)]
    write_column(folder / "text", spec, captions, words(torch.zeros(1, WIDTH)))
    return folder


def study(
    columns: Path, folder: Path, changes: dict[str, list[str]] | None = None, **train: Any
) -> Study:
    """Each of the columns an entry; `changes` of single entries."""
    values = tiny_config(
        columns, folder, steps=1, **{"model": AUTO, "flow": {"shift": "auto"}, **train}
    )
    del values["runs"]
    values["data"] = {"latents": str(columns / "flux"), "text": str(columns / "text"), "lanes": 8}
    (folder / "train.yaml").write_text(yaml.safe_dump(values))
    (folder / "few.json").write_text('{"a": "a"}')
    entries = {
        name: {"latents": str(columns / name), "with": (changes or {}).get(name, [])} for name in SHAPES
    }  # fmt: skip
    text = {
        "train": str(folder / "train.yaml"), "entries": entries, "seeds": [0], "prompts": str(folder / "few.json"),
        "scorers": ["demo-acc"], "ranks": 1, "reuse": [], "settle": None,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return Study.open(folder / "study.yaml", folder / "out")


@pytest.mark.parametrize("sizes", [{}, {"pos_embed_max_size": 16, "sample_size": 8}], ids=str)
def test_what_follows_the_latents_is_paired(
    columns: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    opened = study(columns, tmp_path, model={**AUTO, **sizes})
    existing = Existing(opened)
    check_columns(opened, existing)
    flux, rae, hunyuan = (existing.training(name, 0) for name in SHAPES)
    for other, tokens, shift in ((rae, 16, 0.1875**0.5), (hunyuan, 4, 0.25)):
        assert flux is not None
        assert other is not None
        assert (flux["tokens"], other["tokens"]) == (16, tokens)
        differences = compared(flux, other)
        assert differences.beside == {}
        assert differences.follow["model.patch_size"] == (2, 1)
        assert differences.follow["flow.shift"][0] == 0.5
        assert differences.follow["flow.shift"][1] == pytest.approx(shift)


def test_a_shift_that_does_not_follow_is_a_difference(columns: Path, tmp_path: Path) -> None:
    """Unless the YAML says it."""
    opened = study(columns, tmp_path)
    existing = Existing(opened)
    flux, rae = (existing.training(name, 0) for name in ("flux", "rae"))
    assert flux
    assert rae
    sides = "flux", 0, "rae", 0
    refuse_unpaired(opened, sides, flux, rae)
    other = {**rae, "flow": {**rae["flow"], "shift": 3.0}}
    with pytest.raises(NotPaired, match=r"flow\.shift: 0\.5 and 3\.0"):
        refuse_unpaired(opened, sides, flux, other)
    refuse_unpaired(study(columns, tmp_path, {"rae": ["flow.shift=3"]}), sides, flux, other)


def test_entries_may_name_patches_of_their_own(columns: Path, tmp_path: Path) -> None:
    """What a patch brings with it, the table of positions and the tokens, is then no difference either."""
    fewer = study(columns, tmp_path, {"rae": ["model.image_tokens=4", "model.hidden_size=192"]})
    check_columns(fewer, Existing(fewer))
    alone = study(columns, tmp_path, {"hunyuan": ["model.patch_size=2", "model.hidden_size=256"]})
    check_columns(alone, Existing(alone))


def test_one_shift_for_all_is_paired_too(columns: Path, tmp_path: Path) -> None:
    opened = study(columns, tmp_path, flow={"shift": 3})
    check_columns(opened, Existing(opened))


def test_a_model_narrower_than_a_token_is_refused_with_its_entry(
    columns: Path, tmp_path: Path
) -> None:
    opened = study(columns, tmp_path, {"rae": ["model.hidden_size=32"]})
    with pytest.raises(ConfigError, match="rae: model: found tokens of 48 x 1 x 1 = 48 values"):
        check_columns(opened, Existing(opened))


def test_a_phase_of_latents_of_other_channels_is_refused(columns: Path, tmp_path: Path) -> None:
    """They are the model's; another side of the latents is not."""
    study(columns, tmp_path)  # writes the YAML
    for second, message in (("flux", ""), ("rae", r"phase 2 cannot(.|\n)*latents: 16 and 48")):
        phases = [{"latents": str(columns / name)} for name in ("flux", second)]
        entries = {"two": {"phases": phases}, "flux": str(columns / "flux")}
        values = yaml.safe_load((tmp_path / "study.yaml").read_text()) | {"entries": entries}
        (tmp_path / "phases.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        opened = Study.open(tmp_path / "phases.yaml", tmp_path / "out")
        with pytest.raises(BadStudy, match=message) if message else nullcontext():
            check_columns(opened, Existing(opened))


def test_another_shift_of_the_sampler_makes_other_sets(made: Path) -> None:
    """The runs' own, said as a number, does not."""
    base = {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 6}
    lines = {}
    for shift in (None, 3, 1.5):
        flags = base if shift is None else {**base, "shift": shift}
        opened = Study.open(study_yaml(made, "shifted", generate=flags), made / "out")
        lines[shift] = Existing(opened).set_differences(reported_set(opened, "plain", 0, 6))
    assert lines == {None: [], 3: [], 1.5: ["shift: None there, 1.5 now"]}


# From tars to the page --------------------------------------------------------------------------

SD = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 16, 16, 16], "latent_channels": 4, "norm_num_groups": 4, "sample_size": SIDE,
    "scaling_factor": 0.18215,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # fifteen processes that import torch
def test_one_config_serves_flux_sd_hunyuan_dc_and_rae(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path)
    models = {
        "sd": ("moments", "AutoencoderKL", saved(folder / "sd", "diffusers", "AutoencoderKL", SD)),
        "hunyuan": ("moments", "AutoencoderKLHunyuanImage", save_hunyuan(folder / "hunyuan")),
        "dc": ("latents", "AutoencoderDC", save_dc(folder / "dc")),
        "rae": ("latents", "AutoencoderRAE", save_rae(folder / "rae")),
    }
    entries = {"plain": "plain"} | {
        name: {
            "latents": name, "kind": kind, "encoder": {"class": cls, "path": str(path)}, "resolution": SIDE,
        }
        for name, (kind, cls, path) in models.items()
    }  # fmt: skip
    train = yaml.safe_load((folder / "train.yaml").read_text())
    for key in ("patch_size", "pos_embed_max_size", "sample_size"):
        train["model"].pop(key, None)
    train["model"] |= {"patch_size": "auto", "image_tokens": 16}
    train["flow"] = {"shift": "auto"}
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    config = study_yaml(folder, entries=entries)
    result = run_study("run", config, "--out", folder / "out", "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    report = run_study("report", config, "--out", folder / "out")
    assert report.returncode == 0, report.stdout + report.stderr
    data = json.loads((folder / "out/study.json").read_text())
    names = [entry["name"] for entry in data["entries"]]
    assert data["complete"]
    shapes = {name: Column.open(folder / "cache/pets" / name).layout.row_shape for name in names}
    assert len(set(shapes.values())) > 2, shapes
    differ = data["differ"]["training"]
    shifts = dict(zip(names, differ["flow.shift"], strict=True))
    for name, shape in shapes.items():
        channels = shape[0] // 2 if name not in ("dc", "rae") else shape[0]
        values = channels * shape[1] * shape[2]
        assert shifts[name] == pytest.approx((values / 4096) ** 0.5, rel=1e-3)
        start = (folder / f"out/logs/train/{name}/seed0.log").read_text()
        assert "tokens of a picture:" in start
        assert f"shift {shifts[name]:.4g}" in start
    assert set(differ) & {"tokens", "model.patch_size"}
    for comparison in data["comparisons"]:
        assert comparison["paired"]
        assert comparison["training"]["differ"] == {}
        assert "flow.shift" in comparison["training"]["follow"]
    assert "flow.prediction" not in differ
    assert {t["prediction"] for t in data["targets"].values()} == {"velocity"}
    (line,) = (line for line in data["covers"] if "target" in line)
    assert line.startswith(
        "one target for all, the velocity, though the latents differ in dimension"
    )
    for name, shape in shapes.items():
        channels = shape[0] // 2 if name not in ("dc", "rae") else shape[0]
        size = f"{channels} channels, {channels * shape[1] * shape[2]:,} values"
        assert f"{name}: {size}" in line
    page = (folder / "out/report.html").read_text()
    for key in ("flow.shift", "model.patch_size"):
        assert f'{key} <span class="badge">follows the VAE</span>' in page


# Trained ------------------------------------------------------------------------------------------


def test_a_last_validation_that_a_signal_cut_short_is_still_to_be_made(
    columns: Path, tmp_path: Path
) -> None:
    """The training goes on for it, at its last step; of metrics that were removed nothing is asked."""
    held_out = {"source": str(columns), "rows": 4, "batch": 4, "reference": False}
    made = study(columns, tmp_path, validation=held_out)
    config, run = made.train_config("flux", 0), made.own_run_folder("flux", 0)
    metrics = run / "metrics.jsonl"
    run.parent.mkdir(parents=True)

    def train() -> None:
        code, output = forked(lambda: fit(config, run), tmp_path / "log")
        assert code == 0, output

    train()
    assert Existing(made).trained("flux", 0, 0)
    lines = metrics.read_text().splitlines(keepends=True)
    (loss,) = (line for line in lines if "validation" in json.loads(line))
    metrics.write_text("".join(line for line in lines if line != loss))  # as a signal leaves it
    assert not Existing(made).trained("flux", 0, 0)
    assert take_over(with_rates(tmp_path, made)).hand_runs == {}  # its loss is to choose
    without = study(columns, tmp_path)
    assert Existing(without).trained("flux", 0, 0)
    train()
    assert Existing(made).trained("flux", 0, 0)
    assert Existing(made).validation_loss("flux", 0) == json.loads(loss)["validation"]["loss"]
    study(columns, tmp_path, validation=held_out)
    assert take_over(with_rates(tmp_path, made)).hand_runs == {("flux-lr-0.003", 0, 0): run}
    metrics.unlink()
    assert Existing(made).trained("flux", 0, 0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rows": 8}, "validation.rows: 4 there, 8 now"),
        ({"source": "other/cache"}, "validation.source: held-out there, cache now"),
        ({"source": "moved/held-out", "batch": 2, "every": 7}, None),
    ],
    ids=str,
)
def test_losses_of_other_rows_choose_no_rate(
    columns: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    line: str | None,
) -> None:
    """Some trainings would be judged by these and some by those; wherever the rows lie."""
    held_out = {"source": "held-out", "rows": 4, "batch": 4, "reference": False}
    made = study(columns, tmp_path, validation=held_out)
    before = made.train_config("flux", 0).validation
    changed = study(columns, tmp_path, validation=held_out | change)
    by_rate = with_rates(tmp_path, changed)
    for opened, name in ((changed, "flux"), (by_rate, "flux-lr-0.003")):
        config = opened.train_config(name, 0).model_copy(update={"validation": before})
        monkeypatch.setattr(Existing, "newest", lambda *_, c=config: expected_record(c))
        lines = [line] if line and opened is by_rate else []
        assert Existing(opened).run_differences(name, 0, 0, tmp_path) == lines


def with_rates(folder: Path, made: Study) -> Study:
    """A study in a folder of its own that chooses among learning rates, and takes over runs of another."""
    text = yaml.safe_load((folder / "study.yaml").read_text())
    rates = {"lr": [3e-3, 1e-3], "guidance_scale": None, "ema": None}
    text |= {"settle": rates, "reuse": [str(made.out / "runs")]}
    (folder / "rates.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return Study.open(folder / "rates.yaml", folder / "rates")
