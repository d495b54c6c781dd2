"""What a column of latents says before anything is trained on it: the error of the best linear
predictor by noise level, and the structure of its latents. numpy alone.
"""

from __future__ import annotations

from .held_out import held_out_reference
from .panel import panel
from .rows import ColumnRows, caption_groups, common_rows, evenly, pooled_text
from .spectra import work

__all__ = [
    "ColumnRows",
    "caption_groups",
    "common_rows",
    "evenly",
    "held_out_reference",
    "panel",
    "pooled_text",
    "work",
]
