"""What a column of latents says before anything is trained on it: the error of the best linear
predictor by noise level, and the structure of its latents. numpy alone.
"""

from __future__ import annotations

from .estimates import Estimate, no_figure
from .panel import Panel, panel, refuse_constant
from .reference import linear_error
from .rows import ColumnRows, LatentRows, Part, caption_groups, common_rows, evenly, pooled_text
from .spectra import References, linear_references

__all__ = [
    "ColumnRows",
    "Estimate",
    "LatentRows",
    "Panel",
    "Part",
    "References",
    "caption_groups",
    "common_rows",
    "evenly",
    "linear_error",
    "linear_references",
    "no_figure",
    "panel",
    "pooled_text",
    "refuse_constant",
]
