"""Folders of strangers: edited manifests, scores and metrics end in an error of the family, quickly and in little
memory; nothing outside of a set gets onto a page; pipes are not waited for."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import configs
from configs import ConfigError
from encode.errors import ModelNotUsable
from eval.distances import influences, references
from eval.distances.references import Reference
from eval.errors import BadPrompts, BadReference, EvalError, OtherImages
from eval.images.generator import Generator, Request
from eval.images.imageset import ImageSetReader, ImageSetWriter
from eval.prompts.benchmarks import find
from eval.prompts.prompts import Prompt, Prompts
from eval.report.report import report
from eval.scores import results
from shards import FormatVersion, ShardsError, canonical_json, console, seal
from shards.console import Bar
from shards.printing import one_line
from tests.eval.models import DIT
from tests.eval.sets import SETTINGS, make_items, make_score, make_set
from tests.train.conftest import tiny_config
from train.checkpoints import checkpoint, init_weights
from train.checkpoints.checkpoint import CheckpointError
from train.config import TrainConfig
from train.report import page
from train.report.records import forget_after, read_records

PROMPTS = Prompts("bench", (Prompt("a", "one", "g"), Prompt("b", "two", "g")))
NAMED = (EvalError, ShardsError, ConfigError, CheckpointError)
MOST_BYTES = 64 << 20
EDITS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from([10**9, -1, 2**63, 10**400, "x", "../../x", "\ud800", "\x1b[31m", [[[[]]]], {"a": {}}, 1e308]),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A test that waits for ever is killed."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_set(
        tmp_path / "set", prompts=PROMPTS, provenance={"seconds": 1.0, "device": "cpu"}
    )
    score = make_score(folder, "toy", make_items([0.5, 0.25], PROMPTS))
    influences.write(folder, "toy", score.images, [influences.Influence("a", 0, 1.0)])
    return folder


def spots(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from spots(item, (*at, key))


def edited(value: Any, draw: Callable[..., Any]) -> Any:
    """One place holds another value, or is gone."""
    at = draw(st.sampled_from(list(spots(value))))
    new, gone = draw(VALUES), draw(st.booleans())
    if not at:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if gone:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def borne(act: Callable[[], Any]) -> None:
    """It works, or says what is wrong with exit code 2."""
    code = 2
    try:
        act()
    except NAMED as error:
        code = type(error).exit_code
    assert code == 2


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "prompts.json",
        "scores/toy.json",
        "scores/toy.items.jsonl",
        "scores/toy.influences.jsonl",
    ],
)
def test_an_edited_file_of_a_set(tmp_path: Path, folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]

    @EDITS
    @given(st.data())
    def check(data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(range(len(lines))))
        value = edited(lines[number], data.draw)
        if name == "scores/toy.json" and isinstance(value, dict):
            value.pop("digest", None)
            try:
                new = seal(value)
            except (ValueError, UnicodeEncodeError):
                new = dumped(value)
        else:
            new = dumped(value)
        path.write_bytes(
            b"\n".join([*whole.splitlines()[:number], new, *whole.splitlines()[number + 1 :]])
        )
        borne(lambda: report([folder], tmp_path / "r.html"))
        borne(lambda: ImageSetWriter(folder, PROMPTS, SETTINGS).finish({}))
        borne(lambda: influences.read(folder, "toy", ImageSetReader.open(folder).digest))
        borne(
            lambda: results.read_items(folder / "scores/toy.json") if ".items" not in name else None
        )

    check()


@pytest.mark.parametrize("data", [
    b"", b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b'{"format": NaN}', b"null", b"\x00" * 99,
])  # fmt: skip
@pytest.mark.parametrize("name", ["manifest.json", "prompts.json", "scores/toy.json"])
def test_bytes_that_are_no_record(tmp_path: Path, folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(NAMED) as refused:
        report([folder], tmp_path / "r.html")
    assert type(refused.value).exit_code == 2
    assert not isinstance(refused.value, FormatVersion)


def test_a_huge_file_is_not_read(folder: Path) -> None:
    """A hole of 8 GB in place of a manifest."""
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(8 << 30)
    tracemalloc.start()
    borne(lambda: ImageSetReader.open(folder))
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["id", "group"])
@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/hostname", "..", "a/b", "a\\b", ".", "\x1b[31m", "", " a", "\0"]
)
def test_names_that_climb_out_of_a_set(tmp_path: Path, name: str, field: str) -> None:
    """The digests fit: whoever made the set also wrote its manifest. No page holds what is outside."""
    prompts = Prompts("bench", (Prompt(**{"id": "a", "text": "t", field: name}),))  # type: ignore[arg-type]
    folder = make_set(tmp_path / "set", prompts=Prompts("bench", (Prompt("a", "t"),)))
    outside = make_set(tmp_path / "other", prompts=Prompts("bench", (Prompt("outside", "t"),)))
    (tmp_path / "outside.png").write_bytes((outside / "images/outside.png").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"] |= {"prompts": prompts.digest, "layout": "by-group"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "prompts.json").write_bytes(canonical_json(prompts.to_json()))
    with pytest.raises(OtherImages, match="cannot name a file|embedded null"):
        report([folder], tmp_path / "r.html", partial=True)
    assert not (tmp_path / "r.html").exists()


def test_names_of_folders_on_pages(tmp_path: Path, folder: Path) -> None:
    """Escape sequences, halves of characters (bytes that are no UTF-8) and urls with passwords."""
    for i, name in enumerate(("e\x1b[31m\x9b2J", os.fsdecode(b"n\xff"), "u\u202et")):
        folder = folder.rename(folder.with_name(name))
        run = tmp_path / f"run {name}"
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(dumped({"step": 1, "start": {}}) + b"\n")
        report([folder], tmp_path / "r.html", runs={one_line(name): run})
        actual = report([folder], tmp_path / "r.html")  # it reads its own JSON
        assert actual["sections"][0]["sets"][0]["name"] == one_line(name)
        html = (tmp_path / "r.html").read_text()
        assert one_line(name) in html
        assert not set(html) & {"\x1b", "\x9b", "\u202e"}
        assert page_of_a_run(run, i)


def page_of_a_run(run: Path, i: int) -> bool:
    start = {
        "mix": {"a\x1b[31m": 1.0},
        "epoch_samples": 1,
        "parameters": {},
        "world": 1,
        "device": "\x9b",
    }
    (run / "metrics.jsonl").write_bytes(dumped({"step": i, "start": start}) + b"\n")
    config = {
        "data": {"latents": "s3://me:SEC/RET@b/x", "text": "t"},
        "steps": 1,
        "global_batch": 1,
        "seed": 0,
    }
    (run / "config.yaml").write_text(json.dumps(config))
    html = page.write_page(run).read_text()
    return "RET" not in html and not set(html) & {"\x1b", "\x9b", "\u202e"}


def test_a_picture_that_leads_elsewhere_is_none_of_the_set(tmp_path: Path, folder: Path) -> None:
    """A link is followed, and what it leads to has another digest or stamp."""
    private = make_set(tmp_path / "private", {"seed": 7}, PROMPTS, seed=9) / "images/a.png"
    (folder / "images/a.png").unlink()
    (folder / "images/a.png").symlink_to(private)
    for complete in (True, False):
        if not complete:
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
        with pytest.raises(OtherImages):
            report([folder], tmp_path / "r.html", partial=True)


def test_names_with_braces_and_brackets_on_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with Bar("{x}[bold]y[/] :smile: \x1b[31m", 2, "pictures") as bar:
        bar.advance(2)
    output = capsys.readouterr().err
    assert "{x}[bold]y[/] :smile: \\x1b[31m 2/2" in output


# Pipes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "prompts.json", "scores/toy.json", "scores/toy.items.jsonl", "images/a.png"],
)
def test_a_pipe_in_place_of_a_file_of_a_set(tmp_path: Path, folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for act in (
        lambda: report([folder], tmp_path / "r.html", partial=True),
        lambda: ImageSetWriter(folder, PROMPTS, SETTINGS).has(
            ImageSetWriter(folder, PROMPTS, SETTINGS).files[0]
        ),
        lambda: results.read_items(folder / "scores/toy.json"),
    ):
        borne(act)


def test_a_pipe_in_place_of_a_file_of_a_run(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints/step-00000001"
    step.mkdir(parents=True)
    for name in (
        "checkpoints/step-00000001/manifest.json",
        "metrics.jsonl",
        "config.yaml",
        "prompts.json",
        "r.csv",
    ):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="it is no file"):
        checkpoint.verified(step)
    with pytest.raises(ConfigError, match="it is no file"):
        read_records(tmp_path / "metrics.jsonl")
    with pytest.raises(ShardsError, match="it is no file"):
        forget_after(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(ConfigError, match="a pipe"):
        configs.read_yaml(tmp_path / "config.yaml")
    with pytest.raises(BadPrompts, match="it is no file"):
        find("prompts", tmp_path / "prompts.json")


# Runs ----------------------------------------------------------------------------------------------------------------

METRICS = [
    {"step": 0, "start": {"mix": {"s": 1.0}, "epoch_samples": 9, "world": 1, "device": "cpu", "parameters": {"a": 3}}},
    {"step": 1, "position": 8, "loss": 1.0, "loss_by_level": [1.0, None] * 4, "grad_norm": 1.0, "data_wait": 0.0,
     "samples_per_second": 9.0, "mfu": None, "epoch": 0.1},
    {"step": 1, "validation": {"loss": 1.0, "normalised": 0.5, "levels": [1.0] * 8, "seconds": 1.0}},
]  # fmt: skip
WATCHED = [
    {
        "step": 1,
        "scores": {"toy": {"value": 1.0, "low": None, "high": None, "count": 2}},
        "asked": ["toy"],
    }
]


@pytest.mark.parametrize(
    ("name", "lines"), [("metrics.jsonl", METRICS), ("eval/metrics.jsonl", WATCHED)]
)
def test_edited_metrics(tmp_path: Path, name: str, lines: list[Any]) -> None:
    run = tmp_path / "run"
    folder = make_set(run / "eval/step-00000001", prompts=PROMPTS)
    (run / "config.yaml").write_text(
        "{data: {latents: a, text: b}, steps: 1, global_batch: 8, seed: 0}"
    )
    for place, records in (("metrics.jsonl", METRICS), ("eval/metrics.jsonl", WATCHED)):
        (run / place).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "accuracy" not in page.page(run)
    report([folder], tmp_path / "r.html")

    @EDITS
    @given(st.data())
    def check(data: st.DataObject) -> None:
        value = edited(lines, data.draw)
        text = "".join(
            json.dumps(v) + "\n" for v in (value if isinstance(value, list) else [value])
        )
        (run / name).write_text(text)
        borne(lambda: page.page(run))
        borne(lambda: report([folder], tmp_path / "r.html"))
        borne(lambda: forget_after(run / name, 0))

    check()


def test_an_edited_manifest_of_a_checkpoint(tmp_path: Path) -> None:
    from tests.train import saves

    path = saves.save(tmp_path, 1) / "manifest.json"
    record = json.loads(path.read_bytes())
    del record["digest"]
    whole = path.read_bytes()

    @EDITS
    @given(st.data())
    def check(data: st.DataObject) -> None:
        value = edited(record, data.draw)
        try:
            path.write_bytes(seal(value) if isinstance(value, dict) else dumped(value))
        except (ValueError, UnicodeEncodeError):
            path.write_bytes(whole[: len(whole) // 2])
        borne(lambda: checkpoint.pins(tmp_path))
        borne(lambda: checkpoint.newest(tmp_path))
        borne(lambda: checkpoint.load_for_sampling(path.parent))

    check()


LATENTS, TEXT = ("data", "latents"), ("data", "text", "identity")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ((*LATENTS,), 5), ((*LATENTS, "norm"), None), ((*LATENTS, "norm", "scale"), []),
        ((*LATENTS, "norm", "scale"), ["x"]), ((*LATENTS, "identity", "encoder"), 5),
        ((*LATENTS, "identity", "encoder", "weights"), 5), ((*LATENTS, "identity", "encoder", "precision"), 5),
        ((*LATENTS, "identity", "preprocess"), {}), (TEXT, 5), ((*TEXT, "encoder"), {}),
        ((*TEXT, "preprocess"), None), ((*TEXT, "preprocess", "max_tokens"), "x"),
        ((*TEXT, "preprocess", "template"), 5), ((*TEXT, "preprocess", "tokenizer"), 5), (("init",), 5),
        (("init",), {"training": []}), (("latent_shape",), None), (("latent_shape",), [4, "x", 4]), (("order",), 5),
        (("order",), {}), (("config",), {}), (("config",), {"optim": 5}), (("reference",), 5),
    ],
)  # fmt: skip
def test_a_checkpoint_of_strangers_says_what_is_wrong(
    tmp_path: Path, run: Path, at: tuple[str, ...], value: Any
) -> None:
    """What `generate` and `init_from` read of a manifest, sealed anew."""
    step = shutil.copytree(run / "checkpoints/step-00000020", tmp_path / "step-00000020")
    record = json.loads((step / "manifest.json").read_bytes())
    del record["digest"]
    inner = record
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    (step / "manifest.json").write_bytes(seal(record))
    with pytest.raises((CheckpointError, ModelNotUsable)):
        Generator.load(Request(checkpoint=step, save_dir=tmp_path / "out"))
    if at[0] in ("init", "latent_shape", "order", "config"):
        config = TrainConfig.model_validate(tiny_config(tmp_path, tmp_path, init_from=step))
        with pytest.raises(CheckpointError, match="is damaged"):
            init_weights.find_initial(config, DIT)


def test_an_edited_reference(tmp_path: Path) -> None:
    """Its label becomes part of a file's name."""
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    record = {"network": "n", "weights": "w", "resize": "r", "crop": "none", "count": 5}
    references.write(
        Reference("r", record, features, (None,) * 5, ("0" * 64,) * 5), tmp_path / "whole"
    )
    assert references.read(tmp_path / "whole").label == "r"
    tensors = load_file(tmp_path / "whole")
    with safe_open(tmp_path / "whole", "numpy") as file:
        message = json.loads(file.metadata()["record"])
    for more in (
        {"label": "../../x"},
        {"record": {}},
        {"record": record | {"count": 0}},
        {"groups": 7},
        {"contents": {}},
    ):
        save_file(tensors, tmp_path / "edited", {"record": json.dumps(message | more)})
        with pytest.raises(BadReference):
            references.read(tmp_path / "edited")
    narrow = tensors | {"mean": tensors["mean"][:2]}
    infinite = tensors | {"features": np.where(np.eye(5, 3) > 0, np.inf, tensors["features"])}
    for edited_tensors, problem in (
        (narrow, "mean is of shape"),
        (infinite, "hold NaN or infinity"),
    ):
        message["contents"] = references._contents(edited_tensors)
        save_file(edited_tensors, tmp_path / "edited", {"record": json.dumps(message)})
        with pytest.raises(BadReference, match=problem):
            references.read(tmp_path / "edited")


def test_a_watcher_leaves_sets_of_a_newer_release(tmp_path: Path) -> None:
    from eval.images.generator import Request
    from eval.watch import Watcher

    folder = make_set(tmp_path / "eval/step-00000001", prompts=PROMPTS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    watcher = Watcher.__new__(Watcher)
    watcher.run, watcher.folder, watcher.scorers, watcher.passed = (
        tmp_path,
        tmp_path / "eval",
        (),
        set(),
    )
    watcher.order, watcher.request = (
        "newest",
        Request(checkpoint=tmp_path, save_dir=tmp_path / "eval"),
    )
    with pytest.raises(FormatVersion, match="version 3"):
        watcher.pending()
