"""`python -m encode config`: what a config says in full."""

from __future__ import annotations

import argparse

from configs import show


def add_config_options(parser: argparse.ArgumentParser) -> None:
    show.add_options(parser)


def run_config(args: argparse.Namespace) -> int:
    from .config import EncodeConfig

    return show.run(EncodeConfig, args)
