"""What a training run will cost: FLOPs, memory, bytes, hours and money."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

from ..model.flops import Gpu
from .caching_speedup import VAES, Efficiency
from .plan import add_setting_options, data_summary, gpu_named

if TYPE_CHECKING:
    from .estimate import RunPlan, Setting, make_plan
    from .survey import DataSummary
else:
    __getattr__ = lazy_getattr(
        __name__,
        {"estimate": ("RunPlan", "Setting", "make_plan"), "survey": ("DataSummary",)},
    )

__all__ = [
    "VAES",
    "DataSummary",
    "Efficiency",
    "Gpu",
    "RunPlan",
    "Setting",
    "add_setting_options",
    "data_summary",
    "gpu_named",
    "make_plan",
]
