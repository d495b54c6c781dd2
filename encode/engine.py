"""One source shard through its encoders: decode once, feed every column, write blocks of 1,024
rows, commit.

Batches depend on the shard and the config alone, so a second attempt gives the same bytes on the
same machine. The same function serves a laptop (inline) and a cluster (inside a Ray actor).
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards import ColumnSpec, IndexRow, ShardWriter, Status, Store, put_index
from shards.quantise import stored_rows
from shards.schema import ZARR_ROWS
from shards.storage import Json

from .config import EngineConfig, MomentsColumn, TokensColumn
from .images import decode, to_pixels, transform
from .source import CAPTION_BYTES, scan_tar
from .text import TextEncoder
from .vae import Vae


@dataclass(frozen=True, slots=True)
class Target:
    """A column that a shard is to be written to."""

    store: Store
    digest: str  # of its column.json
    spec: ColumnSpec


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One tar and the columns it still lacks. `number` is its shard, `folder` that of the
    source.
    """

    source: str
    fingerprint: str
    folder: Store
    tar: Path
    number: int
    shard_rows: int
    targets: dict[str, Target]  # by name of the column in the config

    @property
    def name(self) -> str:
        return f"{self.source}/{self.number:05d}"


@dataclass(slots=True)
class ShardResult:
    """What a shard gave: rows, rows by status of each column, seconds by stage."""

    rows: int
    counts: dict[str, dict[str, int]]
    seconds: dict[str, float]
    note: str | None


@dataclass(slots=True)
class Encoder:
    """A column's config and the model that fills it."""

    config: MomentsColumn | TokensColumn
    model: Any  # Vae or TextEncoder


@dataclass(slots=True)
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + passed


def encode_shard(
    task: ShardTask,
    encoders: dict[str, Encoder],
    config: EngineConfig,
    lock: threading.Lock,
    report: Callable[[int], None] = lambda rows: None,
) -> ShardResult:
    """Encode one tar into every column of the task and commit each. `lock` is held while a model
    runs.

    `report` is called with the number of rows of each block written. Raises BadTar, SourceChanged
    or OSError; what was committed stands.
    """
    clock = Clock()
    with clock("scan"):
        rows, note = scan_tar(task.tar, task.shard_rows)
        index = put_index(task.folder, task.fingerprint, task.number, rows, note)
    writers = {
        name: ShardWriter(
            target.store, target.spec, target.digest, task.number, len(rows), index.digest
        )
        for name, target in task.targets.items()
    }
    with task.tar.open("rb") as tar, ThreadPoolExecutor(config.threads) as pool:
        for start in range(0, len(rows), ZARR_ROWS):
            block = rows[start : start + ZARR_ROWS]
            for name, values, status in _encode_block(
                block, tar.fileno(), writers, encoders, config, pool, lock, clock
            ):
                with clock("write"):
                    writers[name].put_block(stored_rows(task.targets[name].spec, values), status)
            report(len(block))
    how = provenance(config)
    counts = {}
    for name, writer in writers.items():
        mine = {s: clock.seconds.get(s, 0.0) for s in ("scan", "decode", name, "write")}
        commit = writer.commit({**how, "seconds": {k: round(v, 3) for k, v in mine.items()}})
        values, amounts = np.unique(commit.status(), return_counts=True)
        counts[name] = {
            Status(int(v)).name.lower(): int(n) for v, n in zip(values, amounts, strict=True)
        }
    return ShardResult(len(rows), counts, clock.seconds, note)


def _encode_block(
    block: Sequence[IndexRow], tar: int, names: Any, encoders: dict[str, Encoder],
    config: EngineConfig, pool: ThreadPoolExecutor, lock: threading.Lock, clock: Clock,
) -> Iterator[tuple[str, Any, NDArray[np.uint8]]]:  # fmt: skip
    """(column, values, status) of up to 1,024 rows: pictures once a resolution, then captions."""
    wanted = {name: encoders[name] for name in names}
    views: dict[tuple[int, str], dict[str, Vae]] = {}
    for name, encoder in wanted.items():
        if isinstance(encoder.config, MomentsColumn):
            key = encoder.config.resolution, encoder.config.image
            views.setdefault(key, {})[name] = encoder.model
    for (resolution, suffix), vaes in views.items():
        yield from _encode_images(block, tar, resolution, suffix, vaes, config, pool, lock, clock)
    for name, encoder in wanted.items():
        if isinstance(encoder.config, TokensColumn):
            captions, status = read_captions(block, tar, encoder.config.caption)
            with lock, clock(name):
                values = _encode_captions(captions, status, encoder.model, config.tokens)
            yield name, values, status


def _encode_images(
    block: Sequence[IndexRow], tar: int, resolution: int, suffix: str, vaes: dict[str, Vae],
    config: EngineConfig, pool: ThreadPoolExecutor, lock: threading.Lock, clock: Clock,
) -> Iterator[tuple[str, Any, NDArray[np.uint8]]]:  # fmt: skip
    """Decode batch k + 1 in threads while the models work on batch k."""

    def load(row: IndexRow) -> tuple[NDArray[np.uint8] | None, Status]:
        if suffix not in row.members:
            return None, Status.IMAGE_MISSING
        offset, size = row.members[suffix]
        image, status = decode(os.pread(tar, size, offset))
        return (None if image is None else transform(image, resolution)), status

    status = np.zeros(len(block), np.uint8)
    moments: dict[str, NDArray[np.float16]] = {}
    starts = range(0, len(block), config.batch)
    loads = [pool.submit(load, row) for row in block[: config.batch]]
    for start in starts:
        after = block[start + config.batch : start + 2 * config.batch]
        with clock("decode"):  # waiting for it
            done = [job.result() for job in loads]
        loads = [pool.submit(load, row) for row in after]
        status[start : start + len(done)] = [s for _, s in done]
        good = [i for i, (image, _) in enumerate(done) if image is not None]
        if not good:
            continue
        pixels = to_pixels(np.stack([done[i][0] for i in good]))  # type: ignore[misc]  # good: not None
        for name, vae in vaes.items():
            with lock, clock(name):
                encoded = to_float16(vae.encode(pixels))
            if name not in moments:
                moments[name] = np.full((len(block), *encoded.shape[1:]), np.nan, np.float16)
            moments[name][start + np.array(good)] = encoded
    for name, vae in vaes.items():
        if name not in moments:  # not one picture of the block could be decoded
            shape = len(block), *vae.moments_shape(resolution)
            moments[name] = np.full(shape, np.nan, np.float16)
        yield name, moments[name], status


def to_float16(moments: torch.Tensor) -> NDArray[np.float16]:
    """fp32 moments -> float16; what float16 cannot hold becomes infinite, which the writer marks
    NON_FINITE.
    """
    return moments.cpu().numpy().astype(np.float16)


def read_captions(
    block: Sequence[IndexRow], tar: int, suffix: str
) -> tuple[list[str | None], NDArray[np.uint8]]:
    """Captions of rows and what became of them: OK, CAPTION_MISSING or CAPTION_UNDECODABLE (not
    UTF-8, or over a megabyte).
    """
    captions: list[str | None] = []
    status = np.zeros(len(block), np.uint8)
    for i, row in enumerate(block):
        caption = None
        if suffix not in row.members:
            status[i] = Status.CAPTION_MISSING
        else:
            offset, size = row.members[suffix]
            try:
                if size <= CAPTION_BYTES:
                    caption = os.pread(tar, size, offset).decode().strip()
            except UnicodeDecodeError:
                pass
            if caption is None:
                status[i] = Status.CAPTION_UNDECODABLE
        captions.append(caption)
    return captions, status


def _encode_captions(
    captions: list[str | None], status: NDArray[np.uint8], model: TextEncoder, budget: int
) -> list[NDArray[np.uint16]]:
    """bfloat16 words (tokens, D) of each row; none where there is no caption."""
    there = [i for i, caption in enumerate(captions) if caption is not None]
    states = model.encode([captions[i] or "" for i in there], budget)
    values = [np.zeros((0, model.width), np.uint16)] * len(captions)
    for i, state in zip(there, states, strict=True):
        values[i] = bf16_words(state)
    return values


def bf16_words(states: torch.Tensor) -> NDArray[np.uint16]:
    """A bf16 tensor as the uint16 words that a column stores."""
    return states.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def provenance(config: EngineConfig) -> Json:
    """What may differ between two attempts at the same column; recorded in commits, never
    compared.
    """
    libraries = ("torch", "diffusers", "transformers", "pillow", "numpy")
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "batch": config.batch,
        "tokens": config.tokens,
    }
