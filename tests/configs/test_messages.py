"""Whatever is wrong with a config is said in words of our own: the key, what was found, what was expected."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from configs import ConfigError, Strict, shown
from configs.keys import keys_of
from configs.messages import OTHER
from encode.config import EncodeConfig
from eval.study.config import StudyConfig
from tests.test_commands import ROOT
from train.config import TrainConfig

MODEL = {"class": "AutoencoderKL", "path": "models/mine"}
NORM = {"shift": [0.0], "scale": [1.0]}
VALUES: dict[type[Strict], dict[str, Any]] = {
    EncodeConfig: {
        "root": "cache",
        "sources": {"mine": "a.tar"},
        "columns": {
            "flux": {"kind": "moments", "encoder": MODEL, "resolution": 32, "norm": NORM},
            "dc-ae": {"kind": "latents", "encoder": MODEL, "resolution": 32, "norm": NORM},
            "dino": {"kind": "features", "encoder": MODEL},
            "gemma": {"kind": "tokens", "encoder": MODEL},
            "ids": {"kind": "ids", "encoder": MODEL},
        },
    },
    TrainConfig: {
        "data": {
            "latents": "cache/flux",
            "text": "cache/gemma",
            "expect": {"channels": 4, "height": 8, "width": 8, "text_width": 8},
        },
        "model": {
            "hidden_size": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp_size": 8,
        },
        "steps": 10, "global_batch": 64, "micro_batch": 8,
    },
    StudyConfig: {
        "train": "train.yaml",
        "entries": {"flux": {"latents": "cache/flux"}, "e2e": {"latents": "cache/e2e"}},
        "prompts": "prompts.txt",
        "scorers": ["fid"],
        "published": {"e2e": {"better": True, "text": "", "source": ""}},
    },
}  # fmt: skip
WRONG: tuple[Any, ...] = (
    *(3, 0, -1, 1.5, -1e300, 10**30, math.nan, -math.inf, True, False, None),
    *("", "x", "nan", "1e-4x", "a b", "s3://bucket/x", "~nobody/x", "x" * 200),
    *([], [3], ["x"], [True], [[]], [math.nan], [None], ["x", "x"], [1, 2, 3, 4, 5]),
    *({}, {"x": 3}, {"x": "y"}, {3: 4}, {"x": {"y": [{}]}}, {"kind": "x"}),
)
THEIRS = (
    *("Input should", "value_error", "Value error", "For further information", "type=", "pydantic"),
    *(
        "should be",
        "should have",
        "should match",
        "valid ",
        "unable to",
        "Unable to",
        "Field ",
        "<class",
    ),
)


def places(values: Any, parts: list[str]) -> Iterator[list[str | int]]:
    """Yields the places of a key in values: NAME is each name there is."""
    if not parts:
        yield []
        return
    held = values if isinstance(values, dict) else {}
    for name in list(held) or ["x"] if parts[0] == "NAME" else [parts[0]]:
        for rest in places(held.get(name), parts[1:]):
            yield [name, *([0] if name == "phases" and rest else []), *rest]


def with_value(values: Any, place: list[str | int], value: Any) -> Any:
    if not place:
        return value
    part, *rest = place
    if part == 0:
        return [with_value(None, rest, value)]
    held = values if isinstance(values, dict) else {}
    return {**held, part: with_value(held.get(part), rest, value)}


def leaves(value: Any) -> Iterator[Any]:
    yield value
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from leaves(part)
    if isinstance(value, dict):
        yield from value


def cases(model: type[Strict]) -> list[list[str | int]]:
    return [place for key in keys_of(model) for place in places(VALUES[model], key.name.split("."))]


@pytest.mark.parametrize("model", VALUES)
def test_the_values_fit(model: type[Strict]) -> None:
    configs._checked(model, VALUES[model], "a.yaml", True)


def faults(message: str, model: type[Strict], place: list[str | int], value: Any) -> Iterator[str]:
    """Yields what is wrong with a message about a value."""
    name = ".".join(map(str, place))
    head, *lines = message.split("\n  ")
    if head != f"a.yaml is no valid {model.__name__}:":
        yield "head"
    yield from (words for words in (*THEIRS, OTHER) if any(words in line for line in lines))
    yield from ("long" for line in lines if len(line) > 500)
    about = [line for line in lines if re.match(rf"{re.escape(name)}\b", line)]
    others = (  # said by a validator of several keys, or of a key above that there is not
        str(place[-1]) in line or name.startswith(line.partition(": unknown key")[0])
        for line in lines
    )
    if not about and not any(others):
        yield "name"
    parts = [text for leaf in leaves(value) for text in (shown(leaf), str(leaf))]
    own = ("missing", "unknown key")  # which do not depend on the value
    if about and not any(text in line for text in (*parts, *own) for line in about):
        yield "found"


@pytest.mark.parametrize("model", VALUES)
def test_a_wrong_value_of_any_key_is_said_in_our_words(model: type[Strict]) -> None:
    refused, bad = 0, []
    for place in cases(model):
        for value in WRONG:
            try:
                configs._checked(model, with_value(VALUES[model], place, value), "a.yaml", True)
            except ConfigError as error:
                refused += 1
                if wrong := list(faults(str(error), model, place, value)):
                    bad.append(f"{wrong} {place} {value!r:.90} {error}")
    assert not bad, "\n".join(bad)
    assert refused > 500


@pytest.mark.parametrize(
    ("model", "words", "line"),
    [
        (StudyConfig, "panel: 3", "panel: found 3, expected keys with values. Its keys are groups, reco"),
        (StudyConfig, "entries: [a, b]", "entries: found [a, b], expected names with values, as {NAME: "),
        (StudyConfig, "ranks: 0", "ranks: found 0, expected a whole number from 1 on. Correct it, or leav"),
        (StudyConfig, "scorers: fid", "scorers: found 'fid', expected a list. Write [fid]"),
        (StudyConfig, "scorers: []", "scorers: found [], expected a list of 1 or more. Correct it"),
        (StudyConfig, "reuse: runs", "reuse: found 'runs', expected a list. Write [runs]"),
        (StudyConfig, "entries: {a: {phases: 3}}", "entries.a.phases: found 3, expected a list of keys with "),
        (StudyConfig, "generate: {3: x}", "generate: found the name 3, expected text. Correct it"),
        (StudyConfig, "scorers: [{fid: 3}]", "scorers.0: found {fid: 3}, expected a scorer's name, or {"),
        (StudyConfig, "with: steps=10", "with: found 'steps=10', expected a list of KEY=VALUE. Write it as"),
        (StudyConfig, "settle: none", "settle: found 'none', expected keys with values. Write null"),
        (StudyConfig, "generate: x", "generate: found 'x', expected names with values, as {NAME: VALUE}. Writ"),
        (TrainConfig, "lr: 1e-4", "lr: unknown key; did you mean optim.lr? Known keys there: compute, "),
        (TrainConfig, "optim: {steps: 3}", "optim.steps: unknown key; did you mean steps? Known keys"),
        (TrainConfig, "metrics: {to: none}", "found 'none', expected a list of tensorboard, wandb or trackio"),
        (TrainConfig, "steps: 1.5", "steps: found 1.5, expected a whole number. Correct it"),
        (TrainConfig, "seed: -1", "seed: found -1, expected a whole number from 0 on. Correct it, or leave "),
        (TrainConfig, "optim: {lr: 0}", "optim.lr: found 0, expected a number above 0. Correct it, or leave"),
        (TrainConfig, "optim: {lr: true}", "optim.lr: found true, expected a number"),
        (TrainConfig, "optim: {lr: .nan}", "optim.lr: found .nan, expected a number"),
        (TrainConfig, "optim: {betas: [0.9]}", "optim.betas: found [0.9], expected a list of 2. Correct it"),
        (TrainConfig, "optim: {betas: 0.9}", "optim.betas: found 0.9, expected a list of 2. Correct it"),
        (TrainConfig, "optim: {schedule: cosin}", "expected constant, linear or cosine; did you mean cosine?"),
        (TrainConfig, "flow: {shift: x}", "flow.shift: found 'x', expected a number or auto. Correct it, or "),
        (TrainConfig, "metrics: {to: wandb}", "metrics.to: found 'wandb', expected a list. Write [wandb]"),
        (TrainConfig, "data: {expect: {hight: 3}}", "data.expect.hight: unknown key; did you mean height?"),
        (TrainConfig, "data: {text: {a: x}}", "data.text.a: found 'x', expected a number. Correct it"),
        (TrainConfig, "data:", "data: found null, expected keys with values. Its keys are ahead, also"),
        (EncodeConfig, "columns: {a: {kind: tokns}}", "columns.a.kind: found 'tokns', expected moments, latents, "),
        (EncodeConfig, "sources: a.tar", "as {NAME: VALUE}. Write {NAME: a.tar}"),
        (EncodeConfig, "engine: {device: cuda:0}", "found 'cuda:0', expected auto, cpu or cuda; did you mean cuda?"),
        (EncodeConfig, "engine: {device: gpu}", "found 'gpu', expected auto, cpu or cuda. Correct it, or"),
        (EncodeConfig, "columns: {a: {}}", "columns.a.kind: missing, expected moments, latents, features, tok"),
        (EncodeConfig, "columns: {a: {kind: tokens, imag: x}}", "columns.a.imag: unknown key. Known keys there"),
        (EncodeConfig, "engine: {cache: x}", "engine.cache: unknown key. Known keys there"),
        (EncodeConfig, "engine: {num_workers: 3}", "engine.num_workers: unknown key; did you mean workers?"),
        (TrainConfig, "prompt: x", "prompt: unknown key. Known keys there"),
        (EncodeConfig, "sources: {a/b: x.tar}", "sources: found the name 'a/b'"),
        (EncodeConfig, "shard_rows: 3", "shard_rows: found 3, expected a multiple of 1024. Correct it, or leav"),
    ],
)  # fmt: skip
def test_messages(model: type[Strict], words: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        configs.load_text(model, words, "a.yaml")
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2: 3", "line 2: found a `: ` where none fits"),
        ("a:\n\tb: 2", "line 2: found a tab, expected spaces"),
        ("a: 1\nb: [c, d\ne: 4", "line 2: found a bracket without its ]"),
        ("a: 1\nsteps 3\nb: 4", "line 2: found a line without `: `, expected `key: value`"),
        ("a: 'x\nb: 3", "line 1: found a quote that is not closed"),
        ("a:\n  b: 1\n c: 2", "line 3: found a line that does not fit those above"),
        ("a: *.tar", "found a value that begins with * or &. Quote it"),
        ("a: @x", "found a value that begins with @. Quote it"),
        ('a: "C:\\x"', "found a backslash in double quotes"),
        ("a: 1\n---\nb: 2", "line 2: found a second document after `---`, expected one"),
        ("[a]: 3", "found a key in brackets, expected a word"),
        ("a: !!int x", "is not valid YAML"),
    ],
)
def test_a_text_that_is_no_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        configs.load_text(TrainConfig, text, "a.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("a.yaml is not valid YAML: ")
    assert "\n" not in str(error.value)


def test_long_values_are_cut() -> None:
    with pytest.raises(ConfigError, match=r"steps: found 'x{76}\.\.\., expected a whole number"):
        configs.load_text(TrainConfig, f"steps: {'x' * 200}", "a.yaml")
    assert shown([None, True, 1.5, "no", Path("x")]) == "[null, true, 1.5, 'no', x]"


def test_many_faults_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\n  scorers\.9: [^\0]+\n  and 29\d\d more$"):
        configs.load_text(StudyConfig, f"scorers: [{'3, ' * 3000}]", "a.yaml")


def test_what_has_no_keys() -> None:
    with pytest.raises(
        ConfigError, match=r"TrainConfig:\n  found 3, expected keys with values\. Its"
    ):
        configs.load_text(TrainConfig, "3", "a.yaml")


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["train"], "demo/train"),
        (["encode", "plan"], "demo/encode"),
        (["eval", "study", "plan"], "demo/study"),
    ],
)
def test_exit_code(command: list[str], path: str, tmp_path: Path) -> None:
    """It is that of docs/faults.md for something to put right."""
    file = tmp_path / "a.yaml"
    file.write_text(f"base: configs:{path}\nsteps: x\nscorers: fid\nroot: 3")
    words = [sys.executable, "-m", *command, str(file)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == ConfigError.exit_code == 2
    assert "expected" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [theirs for theirs in THEIRS if theirs in ended.stderr.replace("no valid", "")]
