"""The verb `config` of a stage: a config with all that it leaves out, or the JSON schema of all configs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    parser.description = (
        "Print a config with every key: those of its base, those of the command line, and the "
        "defaults. With --schema print the JSON schema of all configs, by which editors complete and "
        "check a YAML."
    )
    shipped = "a YAML file, or a shipped one by its name, as configs:train/flux-256"
    parser.add_argument("config", nargs="?", help=shipped)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys to set")
    parser.add_argument("--schema", action="store_true", help="the JSON schema instead")


def run(model: type[BaseModel], args: argparse.Namespace) -> int:
    """Prints what was asked for, of the stage's model; returns the exit code."""
    import yaml

    from . import ConfigError, load
    from .keys import schema_text

    if args.schema:
        print(schema_text(model))
        return 0
    if args.config is None:
        raise ConfigError("found no config, expected CONFIG or --schema")
    config = load(model, args.config, args.overrides)
    values = config.model_dump(mode="json", by_alias=True)
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0
