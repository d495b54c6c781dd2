"""The benchmarks: where their prompts are, how many pictures each asks for, and how the pictures lie.

A benchmark is one entry of BENCHMARKS; a prompt file of one's own is "prompts": a picture each, in one folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import formats
from .errors import BadPrompts
from .formats import FOLDER, LIST, NAMED, NAMED_RECORDS, RECORDS, read_prompts, reader
from .prompts import Prompts

PLACE = Path("prompts")  # where `python -m eval prompts fetch` puts prompt files


@dataclass(frozen=True, slots=True)
class Benchmark:
    read: Callable[[Path], Prompts]  # its official prompt file, or the reference's
    layout: str = "flat"  # of eval.layouts.LAYOUTS
    images_per_prompt: int = 1
    batch_size: int = 32  # pictures; the reference's default
    prompts: int | None = None  # how many the whole benchmark has
    file: str | None = None  # its prompt file, below PLACE/<name>


BENCHMARKS: dict[str, Benchmark] = {
    "prompts": Benchmark(read_prompts),
    "coco30k": Benchmark(
        reader("coco30k", {RECORDS: formats.captioned, LIST: formats.numbered}),
        prompts=30_000, file="captions.csv",
    ),
    "mjhq30k": Benchmark(
        reader("mjhq30k", {NAMED_RECORDS: formats.with_category, LIST: formats.numbered}),
        layout="by-group", prompts=30_000, file="meta_data.json",
    ),
    "geneval": Benchmark(
        reader("geneval", {RECORDS: formats.tagged}),
        layout="folders", images_per_prompt=4, batch_size=4, prompts=553, file="evaluation_metadata.jsonl",
    ),
    "dpgbench": Benchmark(
        reader("dpgbench", {FOLDER: formats.dotless, NAMED: formats.dotless, LIST: formats.prompt_numbered}),
        layout="grids", images_per_prompt=4, batch_size=4, prompts=1065, file="prompts.json",
    ),
    "genaibench": Benchmark(
        reader("genaibench", {NAMED_RECORDS: formats.with_ratings, NAMED: formats.named, LIST: formats.numbered}),
        layout="jpeg", prompts=1600, file="genai_image.json",
    ),
    # no list: its ids count from 00001, and a list does not say so
    "genaibench527": Benchmark(
        reader("genaibench527", {NAMED_RECORDS: formats.with_ratings, NAMED: formats.named}),
        layout="jpeg", prompts=527, file="genai_image.json",
    ),
}  # fmt: skip


def place(name: str, file: str | None = None, folder: Path = PLACE) -> Path:
    """Where `prompts fetch` puts a benchmark's prompt file, or another file of it (questions, skills)."""
    return folder / name / (file or BENCHMARKS[name].file or "")


def find(name: str, path: Path | None = None, folder: Path = PLACE) -> Prompts:
    """A benchmark's prompts, from `path` or from where `prompts fetch` puts them.

    Raises BadPrompts where there are none, or where they are not in a form of the benchmark's.
    """
    benchmark = BENCHMARKS[name]
    if path is None and benchmark.file is None:
        raise BadPrompts(
            f"--benchmark {name}: found no --prompts, expected the file of your prompts"
        )
    path = path or place(name, folder=folder)
    if not path.exists():
        raise BadPrompts(
            f"{path}: no such file. `python -m eval prompts fetch {name}` brings the prompts of {name}; or name a file "
            "with --prompts"
            if benchmark.file
            else f"{path}: no such file"
        )
    return benchmark.read(path)
