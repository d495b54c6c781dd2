"""Words that may follow on the command line of `latentbank`, for argcomplete: stages, verbs, flags and
their choices, files, and shipped configs by name.

    eval "$(register-python-argcomplete latentbank)"      # bash and zsh; argcomplete is the extra `completion`
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from . import PREFIX, shipped_names

# stage -> the module with VERBS and add_options(verb, parser)
MODULES = {
    "encode": "encode.__main__",
    "shards": "shards.__main__",
    "train": "train.__main__",
    "eval": "eval.commands",
}
Completer = Callable[..., list[str]]


def complete() -> None:
    """Answers the shell, and ends the process."""
    try:
        import argcomplete
    except ImportError:  # that of another Python asks
        sys.exit(1)
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))]
    words = line.split()[1:]
    if line and not line[-1].isspace():
        words = words[:-1]  # the last one is being written
    argcomplete.autocomplete(parser_of(words), always_complete_options=False)
    sys.exit(1)  # not asked


def parser_of(
    words: Sequence[str], kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Returns a parser of the line that begins with these words, which are whole. `kind` is that of
    the stages, which this package may not import.
    """
    parser = kind(prog="latentbank")
    parser.add_argument("latentbank stage", choices=MODULES)
    if not words or words[0] not in MODULES:
        return parser
    module: Any = import_module(MODULES[words[0]])
    verb = parser.add_argument("latentbank verb")
    names = partial(_configs, stage="train" if "train" in words[:2] else words[0])
    _completed_by(verb, _verbs(module, names if words[0] == "train" else None))
    if len(words) > 1 and words[1] in module.VERBS:
        module.add_options(words[1], parser)
        for action in parser._actions:
            if action.dest == "config":
                _completed_by(action, names)
    return parser


def _completed_by(action: argparse.Action, completer: Completer) -> None:
    action.completer = completer  # type: ignore[attr-defined]  # argcomplete looks for it


def _verbs(module: Any, or_configs: Completer | None) -> Completer:
    def verbs(prefix: str, **_: Any) -> list[str]:
        return [*module.VERBS, *(or_configs(prefix) if or_configs else ())]

    return verbs


def _configs(prefix: str, stage: str, **_: Any) -> list[str]:
    """Returns YAML files and folders that begin so, and the shipped configs of a stage by name."""
    from argcomplete.completers import FilesCompleter

    shipped = [name for name in shipped_names() if stage in name.removeprefix(PREFIX).split("/")]
    return [*shipped, *FilesCompleter(("yaml", "yml"))(prefix)]
