"""The figures of a run: sums over ranks, the log interval, where they go, and what a logger cannot do to a run."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from configs import ConfigError
from shards.read.stream import Batch
from tests.eval.browser import BROWSER, in_browser
from tests.train.conftest import CHANNELS, SIDE, TINY, WIDTH, tiny_config
from train.config import MetricsConfig, TrainConfig
from train.model.dit import DiTConfig
from train.model.flops import Cost, training
from train.model.flow import level_of, train_sigmas
from train.report.commit import commit
from train.report.loggers import BackgroundLogger, check
from train.report.metrics import (
    LEVELS,
    Metrics,
    StepRecord,
    StepSums,
    Throughput,
    line,
    step_record,
)
from train.report.page import hours_of, page
from train.run import fit, open_columns

# A step over ranks ---------------------------------------------------------------------------------------------------


def batch(lengths: list[int]) -> Batch:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = torch.arange(len(lengths))
    moments = torch.zeros(len(lengths), 8, 2, 2, dtype=torch.float16)
    tokens = torch.zeros(sum(lengths), 3, dtype=torch.bfloat16)
    return Batch(0, rows, rows, moments, tokens, ends)


def test_each_noise_level_has_its_part() -> None:
    sigmas = train_sigmas()
    assert level_of(sigmas, 8).tolist() == [i // 125 for i in range(1000)]
    assert level_of(sigmas, 1000).tolist() == list(range(1000))


def test_two_ranks_are_one_step() -> None:
    sigmas = train_sigmas()[[0, 130, 999, 999]]
    first, second = StepSums(), StepSums()
    first.wait(0.375)
    first.wait(0.125)
    second.wait(0.25)
    first.add(batch([1]), torch.tensor([1.0]), sigmas[:1])  # two micro-batches
    first.add(batch([3]), torch.tensor([2.0]), sigmas[1:2])
    second.add(batch([0, 2]), torch.tensor([4.0, 5.0]), sigmas[2:])
    sums = [a + b for a, b in zip(first.sums(), second.sums(), strict=True)]
    assert len(sums) == StepSums.SIZE
    step = step_record(sums, 2)
    assert step.loss == 3.0
    assert step.level_loss == (1.0, 2.0, 0, 0, 0, 0, 0, 9.0)
    assert step.level_count == (1, 1, 0, 0, 0, 0, 0, 2)
    assert step.samples == 4
    assert (step.tokens, step.padded) == (6, 1 + 3 + 2 * 2)
    assert step.bytes == 4 * 8 * 4 * 2 + 6 * 3 * 2
    assert step.waited == 0.375


def test_a_loss_that_is_not_finite_shows() -> None:
    tally = StepSums()
    tally.add(batch([1, 1]), torch.tensor([1.0, float("nan")]), train_sigmas()[:2])
    assert tally.sums()[0] != tally.sums()[0]


# An interval ---------------------------------------------------------------------------------------------------------


def a_step(loss: float, level: int = 0, tokens: int = 40, padded: int = 50) -> StepRecord:
    sums, counts = [0.0] * LEVELS, [0] * LEVELS
    sums[level], counts[level] = 4 * loss, 4
    return StepRecord(loss, tuple(sums), tuple(counts), tokens, padded, 1000, 0.0)


def test_an_interval_is_the_mean_of_its_steps() -> None:
    pace = Throughput(Cost(1000, 10), peak=1e9)
    for step in (a_step(1.0), a_step(2.0), a_step(6.0, level=7, tokens=10)):
        pace.add(step)
    m = pace.measure(steps_left=6)
    assert m["loss"] == 3.0
    assert m["loss_by_level"] == [1.5, None, None, None, None, None, None, 6.0]
    assert m["text_tokens"] == 90 / 12
    assert m["padding_waste"] == pytest.approx(1 - 90 / 150)
    assert m["flops_per_second"] / m["samples_per_second"] == pytest.approx(1000 + 10 * 90 / 12)
    assert m["mfu"] == pytest.approx(m["flops_per_second"] / 1e9)
    assert m["read_mb_per_second"] / m["samples_per_second"] == pytest.approx(3000 / 1e6 / 12)
    assert m["seconds_left"] == pytest.approx(6 * m["seconds_a_step"])
    assert m["memory_gb"] > 0.05  # torch alone
    seconds = m["seconds_a_step"] * 3
    pace.leave_out(1000 * seconds)  # more than there were
    assert pace.measure(steps_left=6)["seconds_a_step"] < 0
    assert Throughput(Cost(1, 1)).peak is None


def test_no_mfu_without_a_known_peak_and_skipped_steps_apart() -> None:
    pace = Throughput()
    pace.add(a_step(2.0))
    pace.add(a_step(float("nan")))
    m = pace.measure(1)
    assert m["mfu"] is None
    assert (m["loss"], m["not_finite"]) == (2.0, 1)
    assert m["loss_by_level"][0] == 2.0
    assert "MFU" not in line(1, 2, {**m, "grad_norm": 1.0, "lr": 1e-4})
    assert "MFU 50.0%" in line(1, 2, {**m, "grad_norm": 1.0, "lr": 1e-4, "mfu": 0.5})


# On a page ---------------------------------------------------------------------------------------------------------


def test_a_page_of_any_length_and_of_nothing_yet(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(tiny_config(tmp_path, tmp_path)).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="found no metrics.jsonl"):
        page(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert "<svg" not in page(tmp_path)
    steps = [
        {"step": n, "loss": n % 7, "samples_per_second": 1.0, "data_wait": 0.0, "epoch": 0.0}
        for n in range(1, 5001)
    ]
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in (*steps[:9], {**steps[9], "not_finite": 2}))
    )
    assert "43.0% of it are the initial weights" in page(
        tmp_path
    )  # 0.9 ** 8, though no line says it
    levels = [1.0, None, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    checks = {"step": 5000, "validation": {"loss": 0.5, "normalised": 0.25, "levels": levels}}
    odd = {"step": 5001, "loss": None, "samples_per_second": 1.0, "data_wait": 0.0, "epoch": 0.0}
    lines = [json.dumps(r) + "\n" for r in (*steps, checks, odd)]
    path.write_text("".join(lines) + '{"step": 5002, "lo')  # while the run goes on
    result = page(tmp_path)
    assert "loss not finite" in result
    assert "0.5, 0.25 of the target" in result
    curve = re.findall(r'points="([^"]*)"', result)[0].split()
    assert 300 < len(curve) <= 400
    assert result.count("<circle") == 1 + 7  # one validation so far, with seven levels
    (tmp_path / "eval").mkdir()
    scores = {"step": 100, "scores": {"cmmd-<x>": {"value": 2.5, "low": None, "high": None}}}
    for text, charts in ((json.dumps(scores) + "\n", 1), ("{}\n", 0), ("cmmd\n", 0)):
        (tmp_path / "eval" / "metrics.jsonl").write_text(text)
        assert page(tmp_path).count("<svg") == result.count("<svg") + charts
        assert ("cmmd-&lt;x&gt;" in page(tmp_path)) == bool(charts)


def test_the_page_of_a_run_has_hours_its_commit_its_config_and_bands(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(tiny_config(tmp_path, tmp_path)).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [
        {
            "step": n,
            "position": 64 * n,
            "loss": 1 / n,
            "samples_per_second": 0.064,
            "data_wait": 0.25,
        }
        for n in range(10, 101, 10)
    ]  # a step takes 1,000 s
    records = [{"step": 0, "start": {"commit": "abc-dirty"}}, *steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "eval").mkdir()
    scores = [
        {"step": n, "scores": {"acc": {"value": 0.5, "low": 0.4, "high": 0.6}}} for n in (10, 20)
    ]
    (tmp_path / "eval/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scores))
    result = page(tmp_path)
    assert hours_of(records)[-1] == (100, pytest.approx(100 * 1000 / 3600))
    assert ">hours</text>" in result
    assert ">27.8</text>" in result  # below step 100
    assert "<td>abc-dirty</td>" in result
    assert f"global_batch: {config['global_batch']}" in result.partition("<summary>Config")[2]
    assert result.count('<polygon class="band"') == 1
    loss = result.partition("<figcaption>Loss, mean squared error")[2].partition("</svg>")[0]
    assert {">0.02</text>", ">0.05</text>", ">0.1</text>"} <= set(
        re.findall(r">[^<]*</text>", loss)
    )


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 390), (True, 1280), (False, 1920)])
def test_the_page_of_a_run_in_a_browser(tmp_path: Path, dark: bool, width: int) -> None:
    config = TrainConfig.model_validate(tiny_config(tmp_path, tmp_path)).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [{"step": n, "loss": 1 / n, "grad_norm": 1.0, "samples_per_second": n} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps))
    columns = "() => ({columns: new Set([...document.querySelectorAll('figure.curves')].map(f => f.offsetLeft)).size})"
    found = in_browser(page(tmp_path), tmp_path, dark=dark, width=width, extra=columns)
    assert found["wide"] == width
    assert found["columns"] == {390: 1, 1280: 2, 1920: 3}[width]
    assert found["faults"] == []


def test_the_commit_is_that_of_a_clone_alone(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "installed").mkdir()
    assert commit(tmp_path / "installed") is None  # inside another repository


# Where they go -------------------------------------------------------------------------------------------------------


class Kept:
    """A small logger: keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.records.append((step, dict(values)))

    def finish(self) -> None:
        self.closed = True


class Broken(Kept):
    def log(self, values: Mapping[str, float], *, step: int) -> None:
        super().log(values, step=step)
        raise OSError("no route to host")


class Hanging(Kept):
    """Does not come back before the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.release.wait(60)


def test_lines_and_loggers_get_the_same(tmp_path: Path) -> None:
    logger = Kept()
    metrics = Metrics(tmp_path, 0, [BackgroundLogger("kept", lambda: logger)])
    metrics.write(1, loss=0.5, by=[1.0, None], start={"mix": {"a": 1.0}, "device": "cpu"})
    metrics.write(2, loss=float("nan"))
    metrics.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["start"] == {"mix": {"a": 1.0}, "device": "cpu"}
    assert lines[1] == {"step": 2, "loss": None}  # NaN is no JSON
    assert logger.records == [(1, {"loss": 0.5, "by/0": 1.0, "start/mix/a": 1.0}), (2, {})]
    assert logger.closed


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, loss=1.0)
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash
    assert Metrics(tmp_path, 2).path.read_text().count("\n") == 2


def test_a_logger_that_fails_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()

    def refused() -> Kept:
        raise ConnectionError("refused")

    for name, make in (("later", lambda: broken), ("at once", refused)):
        logger = BackgroundLogger(name, make)
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0})
        logger.close()
        logger.thread.join()
        assert logger.failed
    assert len(broken.records) == 1
    assert "later gets no more metrics: OSError: no route to host" in caplog.text
    assert "at once gets no more metrics: ConnectionError: refused" in caplog.text


def test_a_logger_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    hanging = Hanging()
    logger = BackgroundLogger("hanging", lambda: hanging, patience=0.1)
    for step in range(1100):
        logger.log(step, {})  # never waits
    logger.close()
    assert "hanging gets no more metrics: it has not taken the last 1000 records" in caplog.text
    hanging.release.set()
    slow = Hanging()
    logger = BackgroundLogger("slow", lambda: slow, patience=0.1)
    logger.log(1, {})
    logger.close()
    assert "slow gets no more metrics: it has not come to an end" in caplog.text
    slow.release.set()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_named(name: str) -> None:
    if find_spec(name):
        check(MetricsConfig(to=("tensorboard", name)))  # type: ignore[arg-type]  # one of the two
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=f"pip install {name}, or .*metrics.to=.tensorboard."):
        check(MetricsConfig(to=("tensorboard", name)))  # type: ignore[arg-type]  # one of the two


class Service(ModuleType):
    """Stands for wandb or trackio: keeps what `init` was called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.known: list[str] = []  # of each `init`, by what the service tells runs apart

    def init(self, **given: Any) -> Any:
        assert given["resume"] == "allow"
        self.known.append(given.get("id", given["name"]))
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_two_runs_of_one_name_are_two(
    tmp_path: Path, columns: Path, monkeypatch: pytest.MonkeyPatch, environ: None, name: str
) -> None:
    """By an id that a run keeps; one that an earlier version began has the name of its folder."""
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)

    def start(folder: Path, to: list[str], steps: int) -> str | None:
        values = tiny_config(columns, tmp_path, steps=steps, save_every=1, metrics={"to": to})
        assert fit(TrainConfig.model_validate(values), folder / "flux") == 0
        return service.known[-1] if to else None

    first, second = (start(tmp_path / seed, [name], 1) for seed in ("a", "b"))
    assert first != second
    assert first not in (None, "flux")
    assert start(tmp_path / "a", [name], 2) == first

    def as_earlier(folder: Path) -> None:
        (folder / "flux/id").unlink()

    as_earlier(tmp_path / "b")
    assert start(tmp_path / "b", [name], 2) == "flux"
    assert start(tmp_path / "b", [name], 3) == "flux"
    start(tmp_path / "c", [], 1)
    as_earlier(tmp_path / "c")  # no service knows it yet
    assert start(tmp_path / "c", [name], 2) not in ("flux", first)


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def environ() -> Iterator[None]:
    """A run of one process says so in the environment; that is taken back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_what_a_run_writes(columns: Path, tmp_path: Path, environ: None) -> None:
    """Two sources, mixed; every figure that can be worked out from the columns is."""
    values: dict[str, Any] = tiny_config(columns, tmp_path, steps=4, log_every=2)
    values["data"] |= {
        "root": str(columns), "sources": {"toy": 0.75, "toy-val": 0.25}, "latents": "vae", "text": "text",
    }  # fmt: skip
    config = TrainConfig.model_validate(values)
    run = tmp_path / "run"
    assert fit(config, run) == 0
    start, *lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    start = start["start"]
    assert start["mix"] == {"toy": 0.75, "toy-val": 0.25}
    assert (start["world"], start["device"], start["peak_flops_per_second"]) == (1, "cpu", None)
    model = DiTConfig(**TINY, in_channels=CHANNELS, out_channels=CHANNELS, text_width=WIDTH)
    cost = training(model, SIDE, SIDE)
    assert (start["flops_a_sample"], start["flops_a_text_token"]) == (cost.sample, cost.token)
    assert [m["step"] for m in lines] == [2, 4]
    sources = open_columns(config, None)
    order = sources.order(config.seed, config.data.lanes, config.data.window)
    for interval, m in enumerate(lines):
        sources_, rows = order.at(np.arange(32 * interval, 32 * interval + 32))
        lengths = [
            sources.by_source[s].texts[0].lengths(np.array([r]))[0]
            for s, r in zip(sources_, rows, strict=True)
        ]
        assert m["text_tokens"] == sum(lengths) / 32
        per_sample = 2 * 2 * CHANNELS * SIDE * SIDE + 2 * WIDTH * m["text_tokens"]
        assert m["read_mb_per_second"] / m["samples_per_second"] == pytest.approx(per_sample / 1e6)
        assert m["flops_per_second"] / m["samples_per_second"] == pytest.approx(
            cost.of(1, m["text_tokens"])
        )
        assert len(m["loss_by_level"]) == LEVELS
        means = [loss for loss in m["loss_by_level"] if loss is not None]
        assert min(means) <= m["loss"] <= max(means)
        assert m["mfu"] is None
        assert 0 <= m["padding_waste"] < 1
    assert list((run / "tensorboard").iterdir())
    html = (run / "page.html").read_text()
    assert "toy 0.750, toy-val 0.250 of the samples" in html
    assert html.count("<svg") == 5  # no validation here
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert list(saved["data"]["sources"]) == ["toy", "toy-val"]
    sizes = {
        "pos_embed_max_size": saved["model"].pop("pos_embed_max_size"),
        "sample_size": saved["model"].pop("sample_size"),
    }
    assert sizes == {"pos_embed_max_size": 4 * SIDE // 2, "sample_size": SIDE}  # of the latents
    assert TrainConfig.model_validate(saved) == config
