"""What `--help` says: each flag has a text and shows its default; examples are commands."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from configs import load
from configs.completion import MODULES
from encode.config import EncodeConfig
from eval.study import commands as study
from shards.console import Parser
from tests.commands.lines import parsed

STAGES = {stage: importlib.import_module(module) for stage, module in MODULES.items()}
EXAMPLES = [*chain(*(module.EXAMPLES for module in STAGES.values())), *study.EXAMPLES]


def below(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, Parser]]:
    """Yields a parser and those of its verbs, with their names."""
    assert isinstance(parser, Parser), name
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from below(inner, f"{name} {verb}")


def parsers(stage: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Parser]]:
    for verb in STAGES[stage].VERBS:
        monkeypatch.setattr(sys, "argv", [stage, verb])
        parser = Parser(prog=f"{stage} {verb}")
        STAGES[stage].add_options(verb, parser)
        yield from below(parser, f"{stage} {verb}")


@pytest.mark.parametrize("stage", MODULES)
def test_each_flag_has_a_text_and_shows_its_default(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    for name, parser in parsers(stage, monkeypatch):
        formatter = parser._get_formatter()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or action.dest == "help":
                continue
            flag = f"{name}: {(action.option_strings or [action.dest])[0]}"
            assert action.help, f"{flag} has no text"
            shown = formatter._expand_help(action)
            typed = action.option_strings or action.nargs in ("?", "*")
            if typed and action.default not in (None, False, argparse.SUPPRESS, [], "", ()):
                default = action.default
                words = [default] if not isinstance(default, list | tuple) else default
                texts = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
                if default is True:
                    texts = ["(default: on)"]
                assert all(text in shown for text in texts), f"{flag}: {shown} lacks {default}"
            seen += 1
    assert seen > 20


def test_flags_take_dashes_and_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every flag, in each verb; the value is not touched, nor what follows `--`."""
    seen = 0
    for stage in MODULES:
        for _, parser in parsers(stage, monkeypatch):
            for action in parser._actions:
                for flag in action.option_strings:
                    for other in (flag.replace("_", "-"), "--" + flag[2:].replace("-", "_")):
                        if flag.startswith("--") and other != flag:
                            assert parser._as_documented(f"{other}=a-b_c") == f"{flag}=a-b_c"
                            seen += 1
    assert seen > 50
    line = "python -m eval generate --checkpoint run --prompts p.txt --save-dir out --guidance-sc 3"
    args = parsed(line + " --text_encoder=my_model-a --no-ema-weights")
    assert (args.guidance_scale, str(args.save_dir), args.ema_weights) == ([3.0], "out", False)
    assert args.text_encoder == "my_model-a"
    assert Parser()._as_documented("--un_known") == "--un_known"


@pytest.mark.parametrize("name", [*MODULES, "eval study"])
def test_three_examples(name: str) -> None:
    examples = (study if name == "eval study" else STAGES[name]).EXAMPLES
    assert len(examples) == 3
    assert all(line.startswith(f"python -m {name} ") for line in examples)


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_commands(line: str) -> None:
    parsed(line)


def test_what_is_no_command_is_found() -> None:
    for line in ("python -m eval scor x", "python -m eval report a --ot b", "python -m train plan"):
        with pytest.raises(pytest.fail.Exception):
            parsed(line)


@pytest.mark.parametrize(
    "words",
    [
        ("encode", "rn"),
        ("shards", "info"),
        ("shards", "verify", "/no/such/column"),
        ("train", "page", "--nope", "run"),
        ("eval", "score", "geneval"),
        ("eval", "report", "/no/such/set", "/no/such/other"),
    ],
)
def test_each_error_begins_with_its_name(words: tuple[str, ...]) -> None:
    process = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    last = process.stderr.splitlines()[-1]
    assert process.returncode == 2
    assert re.match(r"[A-Z][A-Za-z]+: ", last), process.stderr


def test_columns_of_the_demo_in_examples_are_columns_that_it_makes() -> None:
    config = load(EncodeConfig, Path("configs/demo/encode.yaml"))
    made = {
        f"{config.root}/{source}/{name}" for source in config.sources for name in config.columns
    }
    named = set(re.findall(r"demo/cache/[\w/-]+", " ".join(EXAMPLES)))
    assert named
    assert named <= made
