"""The benchmarks: where their prompts are, how many pictures each asks for, and in which layout.

A benchmark is an entry of BENCHMARKS: `reader` with the forms of its prompt file (of
`eval.prompts.files`; a new form is a function from (id, value) to Prompt), a layout of
`eval.images.layouts`, and the `Source` of each file that it publishes. A prompt file of one's own
is "prompts".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadPrompts
from . import files as formats
from .files import FOLDER, LIST, NAMED, NAMED_RECORDS, RECORDS, read_prompts, reader
from .prompts import Prompt, Prompts
from .published import Source, coco_captions, github, hub, texts_of

PLACE = Path("prompts")  # where `python -m eval prompts fetch` puts prompt files


@dataclass(frozen=True, slots=True)
class Benchmark:
    # reads its official prompt file, or the reference's
    read: Callable[[Path], Prompts]
    layout: str = "flat"  # of eval.images.layouts.LAYOUTS
    images_per_prompt: int = 1
    batch_size: int = 32  # pictures; the reference's default
    prompts: int | None = None  # how many the whole benchmark has
    # fetched to PLACE/<name>; the first is the prompt file
    sources: tuple[Source, ...] = ()


def genai(dataset: str, revision: str) -> tuple[Source, ...]:
    """GenAI-Bench's prompts and the skills that each needs."""
    return tuple(
        Source(file, hub(dataset, revision, file), terms=f"see huggingface.co/datasets/{dataset}")
        for file in ("genai_image.json", "genai_skills.json")
    )


GENEVAL = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"  # commits
GENAI = "e51e8a8070fadfbfe1f160436bf14e7664e87247"
ELLA = "3c228f1dc6c4d3cad0a47493816151a419f14db3"

BENCHMARKS: dict[str, Benchmark] = {
    "prompts": Benchmark(read_prompts),
    "coco30k": Benchmark(
        reader("coco30k", {RECORDS: formats.captioned, LIST: formats.numbered}),
        prompts=30_000,
        sources=(
            Source(
                "captions.csv", "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
                make=coco_captions, terms="COCO's captions are CC BY 4.0",
            ),
        ),
    ),
    "mjhq30k": Benchmark(
        reader("mjhq30k", {NAMED_RECORDS: formats.with_category, LIST: formats.numbered}),
        layout="by-group", prompts=30_000,
        sources=(
            Source(
                "meta_data.json", hub("playgroundai/MJHQ-30K", "main", "meta_data.json"),
                terms="see huggingface.co/datasets/playgroundai/MJHQ-30K",
            ),
        ),
    ),
    "geneval": Benchmark(
        reader("geneval", {RECORDS: formats.tagged}),
        layout="folders", images_per_prompt=4, batch_size=4, prompts=553,
        sources=(
            Source(
                "evaluation_metadata.jsonl", github("djghosh13/geneval", GENEVAL, "prompts/evaluation_metadata.jsonl"),
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13", terms="MIT",
            ),
        ),
    ),
    "dpgbench": Benchmark(
        reader("dpgbench", {FOLDER: formats.dotless, NAMED: formats.dotless, LIST: formats.prompt_numbered}),
        layout="grids", images_per_prompt=4, batch_size=4, prompts=1065,
        sources=(
            Source(
                "prompts.json", f"https://codeload.github.com/TencentQQGYLab/ELLA/tar.gz/{ELLA}",
                make=texts_of("dpg_bench/prompts"), terms="Apache-2.0; the prompts rewrite those of other data sets",
            ),
            Source(
                "dpg_bench.csv", github("TencentQQGYLab/ELLA", ELLA, "dpg_bench/dpg_bench.csv"), terms="Apache-2.0"
            ),
        ),
    ),
    "genaibench": Benchmark(
        reader("genaibench", {NAMED_RECORDS: formats.with_ratings, NAMED: Prompt, LIST: formats.numbered}),
        layout="jpeg", prompts=1600, sources=genai("BaiqiL/GenAI-Bench-1600", GENAI),
    ),
    # no list: its ids count from 00001, and a list does not say so
    "genaibench527": Benchmark(
        reader("genaibench527", {NAMED_RECORDS: formats.with_ratings, NAMED: Prompt}),
        layout="jpeg", prompts=527, sources=genai("zhiqiulin/GenAI-Bench-527", "main"),
    ),
}  # fmt: skip


def place(name: str, file: str | None = None, folder: Path = PLACE) -> Path:
    """Returns where `prompts fetch` puts a benchmark's prompt file, or another file of it."""
    return folder / name / (file or BENCHMARKS[name].sources[0].file)


def find(name: str, path: Path | None = None, folder: Path = PLACE) -> Prompts:
    """Returns a benchmark's prompts, of `path` or as they were fetched; else BadPrompts."""
    benchmark = BENCHMARKS[name]
    if path is None and not benchmark.sources:
        raise BadPrompts(
            f"--benchmark {name}: found no --prompts, expected the file of your prompts"
        )
    path = path or place(name, folder=folder)
    if not path.exists():
        raise BadPrompts(
            f"{path}: no such file. `python -m eval prompts fetch {name}` brings the prompts of {name}; or name a file "
            "with --prompts"
            if benchmark.sources
            else f"{path}: no such file, expected the file of your prompts: .txt, a prompt a line, or .json. Check the "
            "path"
        )
    return benchmark.read(path)
