"""Scorers that ask a detector or a vision-language model."""

from .score import Scorer

JUDGES: dict[str, Scorer] = {}
