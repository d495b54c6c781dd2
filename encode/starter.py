"""`python -m encode config`: what a config says in full."""

from __future__ import annotations

import argparse

from configs import add_config_options, show_config

__all__ = ["add_config_options", "run_config"]


def run_config(args: argparse.Namespace) -> int:
    from .config import EncodeConfig

    return show_config(EncodeConfig, args)
