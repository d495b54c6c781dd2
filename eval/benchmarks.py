"""The benchmarks: where their prompts are, how many pictures each asks for, and how the pictures lie.

A benchmark is one entry of BENCHMARKS; a prompt file of one's own is "prompts": a picture each, in one folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .prompts import Prompts, read_prompts


@dataclass(frozen=True, slots=True)
class Benchmark:
    read: Callable[[Path], Prompts]  # its official prompt file, or the reference's
    layout: str = "flat"  # of eval.layouts.LAYOUTS
    images_per_prompt: int = 1
    batch_size: int = 32  # the reference's default


BENCHMARKS: dict[str, Benchmark] = {
    "prompts": Benchmark(read_prompts),
}
