"""CPU seconds of the engine over those of a bare loop that decodes and encodes the same rows in the
same batches, and writes nothing.

    A  scan the tar, write its index, decode, encode, write the column with all its digests, commit
    B  read the tar from front to end, decode, encode

One process, one thread each for decoding and for the model, and memory that is kept rather than given
back, for both. A and B take turns, and the first pair is not counted. Two cases: an encoder that takes
the most of the time, as encoders do where a CPU runs them, and one as small as the demo's on small
pictures, where everything else is seen as it is.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from encode.config import EngineConfig, MomentsColumn
from encode.models.encoder import Encoder, ImageEncoder
from encode.models.load import load_encoder
from encode.models.pixels import to_pixels
from encode.run.local_worker import Done, InlineExecutor
from encode.source.images import decode, transform
from encode.source.tars import scan_tar
from encode.tasks import ShardTask
from shards import ShardWriter, put_index
from shards.column.checksum import crc32c
from shards.column.writer import block_digest
from shards.console import render
from shards.format.atomic import Json
from tests.bench.cost import cpu_of, paired, tree_cpu_seconds
from tests.bench.turns import turns

from .synthetic import MODELS, picture, save_vae, tasks_of, write_tar

BATCH = 16
SHARD_ROWS = 1_024
TARGET = 1.05


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: a VAE, at a resolution, on pictures of a size."""

    vae: str  # of synthetic.MODELS
    resolution: int
    width: int
    height: int
    rows: int


CASES = {
    "encoder dominates": Case("small", 256, 640, 512, 64),
    "demo": Case("demo", 64, 128, 128, 256),
}


def engine_config() -> EngineConfig:
    return EngineConfig(
        executor="inline", threads=1, torch_threads=1, batch=BATCH, device="cpu"
    )  # fmt: skip


class Bench:
    """A tar, a VAE, and the two ways from one to the other."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.tar = folder / "00000.tar"
        shown = [picture(i, case.width, case.height) for i in range(min(case.rows, 32))]
        captions = (f"picture {i}".encode() for i in count())
        write_tar(
            self.tar, zip((shown[i % len(shown)] for i in range(case.rows)), captions, strict=False)
        )
        self.vae = save_vae(folder / "vae", case.vae)
        self.config = MomentsColumn.model_validate({
            "kind": "moments", "resolution": case.resolution,
            "encoder": {"class": "AutoencoderKL", "path": str(self.vae)},
        })  # fmt: skip
        torch.set_num_threads(engine_config().torch_threads)
        self.encoder: Any = load_encoder(self.config, "cpu")
        self.executor = InlineExecutor({"vae": self.encoder}, engine_config())
        self._columns = (folder / f"column-{number}" for number in count())

    def task(self) -> ShardTask:
        """The tar into a column of its own, which is made here."""
        encoders: dict[str, Encoder] = {"vae": self.encoder}
        (task,) = tasks_of(next(self._columns), [self.tar], encoders, SHARD_ROWS)
        return task

    def engine(self, task: ShardTask) -> None:
        """A: as a run does it."""
        encode(self.executor, task)

    def bare(self) -> int:
        """B: what one would write by hand for one data set; rows encoded."""
        module: Any = self.encoder._module
        batch: list[NDArray[np.uint8]] = []
        rows = 0
        with torch.inference_mode():
            for image in self._pictures():
                batch.append(transform(image, self.case.resolution))
                rows += 1
                if len(batch) == BATCH or rows == self.case.rows:
                    posterior = module.encode(to_pixels(np.stack(batch))).latent_dist
                    posterior.parameters.numpy().astype(np.float16)
                    batch = []
        return rows

    def _pictures(self) -> Iterator[Image.Image]:
        with tarfile.open(self.tar, "r:") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    data = tar.extractfile(member)
                    assert data is not None
                    yield Image.open(io.BytesIO(data.read())).convert("RGB")

    def close(self) -> None:
        self.executor.stop()


def encode(executor: InlineExecutor, task: ShardTask) -> None:
    """Encodes a shard; RuntimeError where that fails."""
    executor.submit(0, 0, task)
    while not (events := executor.events(60.0)):
        continue
    for event in events:
        if not isinstance(event, Done):
            raise RuntimeError(f"the engine did not end well: {event}")


def compare(bench: Bench, rounds: int) -> Json:
    """Ratio of CPU seconds, A over B, of each round."""
    engine: list[float] = []
    bare: list[float] = []
    for number in turns(bench.case.vae, range(-1, rounds)):
        task = bench.task()
        pairs: list[tuple[list[float], Callable[[], object]]] = [
            (engine, lambda task=task: bench.engine(task)), (bare, bench.bare)  # type: ignore[misc]  # a lambda with a default
        ]  # fmt: skip
        for into, work in pairs if number % 2 else pairs[::-1]:  # there and back
            into.append(cpu_of(work))
        task_root = task.folder.parent.folder
        assert task_root is not None
        shutil.rmtree(task_root)
        if number < 0:
            engine.clear()
            bare.clear()
    each = 1e3 / bench.case.rows
    return {
        "rounds": rounds,
        "rows": bench.case.rows,
        "batch": BATCH,
        "vae": f"AutoencoderKL {MODELS[bench.case.vae]['block_out_channels']}",
        "encoder_parameters": _parameters(bench),
        "resolution": bench.case.resolution,
        "pictures": f"{bench.case.width} x {bench.case.height}",
        **paired(engine, bare),
        "engine_cpu_ms_a_row": float(np.median(engine)) * each,
        "bare_cpu_ms_a_row": float(np.median(bare)) * each,
        "stages_cpu_ms_a_row": stages(bench, min(rounds, 5)),
    }


def _parameters(bench: Bench) -> int:
    return sum(p.numel() for p in bench.encoder._module.encoder.parameters())


def stages(bench: Bench, turns: int) -> Json:
    """CPU milliseconds a row of each thing that the engine does, one by one; the least of a few.

    `digest` and `crc` are parts of `write`; the two below the line are what the bare loop does too.
    """
    rows, _ = scan_tar(bench.tar, SHARD_ROWS)
    data = [bench.tar.read_bytes()[o : o + n] for o, n in (row.members["jpg"] for row in rows)]
    images = [decode(item)[0] for item in data]
    crops = np.stack(
        [transform(image, bench.case.resolution) for image in images if image is not None]
    )
    encoder = bench.encoder
    assert isinstance(encoder, ImageEncoder)
    starts = range(0, len(rows), BATCH)
    values = np.ascontiguousarray(
        np.concatenate([encoder.rows(crops[i : i + BATCH]) for i in starts])
    )  # as the engine collects them
    status = np.zeros(len(rows), np.uint8)
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        task = bench.task()
        target = task.targets["vae"]
        writer = ShardWriter(target.store, target.spec, target.digest, 0, len(rows), "0" * 64)
        works: dict[str, Callable[[], object]] = {
            "scan": lambda: scan_tar(bench.tar, SHARD_ROWS),
            "index": lambda t=task: put_index(t.folder, t.fingerprint, 0, rows, None),  # type: ignore[misc]  # a lambda with a default
            "write": lambda w=writer: w.put_block(values, status),  # type: ignore[misc]
            "of which crc": lambda: [crc32c(row) for row in values],
            "of which digest": lambda: block_digest(values, None, status),
            "commit": lambda w=writer: w.commit({}),  # type: ignore[misc]
            "decode": lambda: [decode(item) for item in data],
            "resize and crop": lambda: [
                transform(image, bench.case.resolution) for image in images if image is not None
            ],
            "encode": lambda: [encoder.rows(crops[i : i + BATCH]) for i in starts],
        }
        for name, work in works.items():
            found.setdefault(name, []).append(cpu_of(work))
    return {name: 1e3 * min(spent) / len(rows) for name, spent in found.items()}


def ray_start(config: MomentsColumn, weights: str) -> Json:
    """What Ray costs before the first row: CPU seconds of all its processes, and seconds."""
    from encode.run.ray_workers import RayExecutor

    before, start = sum(tree_cpu_seconds(os.getpid()).values()), time.perf_counter()
    engine = engine_config().model_copy(update={"executor": "ray"})
    executor = RayExecutor({"vae": config}, {"vae": weights}, engine)
    try:
        executor.start(0)
        while not executor.ready(0):
            executor.events(0.2)
        after = sum(tree_cpu_seconds(os.getpid()).values())
        return {"cpu_s": after - before, "seconds": time.perf_counter() - start}
    finally:
        executor.stop()


def run(folder: Path, args: argparse.Namespace) -> tuple[Json, str]:
    """Both cases and Ray's start; (results, text)."""
    found: Json = {"target": TARGET}
    for name, case in CASES.items():
        rows = args.rows or case.rows
        place = folder / name.replace(" ", "-")
        bench = Bench(place, Case(case.vae, case.resolution, case.width, case.height, rows))
        found[name] = compare(bench, args.rounds)
        bench.close()
    if not args.no_ray:
        found["ray start"] = ray_start(bench.config, bench.encoder.weights)
    return found, text_of(found)


def text_of(found: Json) -> str:
    """Ratios, and CPU milliseconds a row by stage."""
    cases = {name: found[name] for name in CASES}
    heads = ["CPU", *cases]
    table = Table(*heads, title="engine over a bare loop that writes nothing, CPU seconds")
    for shown in table.columns[1:]:
        shown.justify = "right"
    rows: dict[str, Callable[[Json], str]] = {
        "VAE": lambda c: f"{c['vae']}, {c['encoder_parameters']:,} parameters",
        "pictures": lambda c: f"{c['pictures']} to {c['resolution']} px, {c['rows']} a tar",
        "ratio, median": lambda c: f"{c['ratio']:.3f}",
        "95 % interval": lambda c: f"{c['ratio_low']:.3f} to {c['ratio_high']:.3f}",
        "engine, ms a row": lambda c: f"{c['engine_cpu_ms_a_row']:.2f}",
        "bare loop, ms a row": lambda c: f"{c['bare_cpu_ms_a_row']:.2f}",
    }
    for name, show in rows.items():
        table.add_row(name, *(show(case) for case in cases.values()))
    table.add_section()
    for stage in next(iter(cases.values()))["stages_cpu_ms_a_row"]:
        each = (case["stages_cpu_ms_a_row"][stage] for case in cases.values())
        table.add_row(stage, *(f"{value:.3f}" for value in each))
    first = next(iter(cases.values()))
    verdict = "holds" if first["ratio_high"] <= TARGET else "does NOT hold"
    lines = [f"claim: at most {first['ratio_high']:.3f}; the target of {TARGET} {verdict}"]
    if ray := found.get("ray start"):
        lines.append(
            f"Ray's start, once a run: {ray['cpu_s']:.1f} CPU seconds of all its processes, "
            f"{ray['seconds']:.1f} s"
        )
    return render(table, *lines)
