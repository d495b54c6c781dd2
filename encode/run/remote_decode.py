"""Pictures decoded on other nodes: for clusters whose GPUs would wait for their own few CPUs.

A Ray task, one CPU, reads the tar where it runs and sends batches of crops, at most a few ahead of
the encoder. It must find the very index that the worker found. Ray is not to repeat it: whatever
goes wrong fails the attempt, and the shard is decoded by its own worker the next time.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shards import sha256
from shards.column import ShardIndex

from ..config import EngineConfig
from ..errors import RemoteDecodeFailed
from ..source.decoding import Batch, View, load, spans
from ..source.fetch import fetched
from ..source.tars import Tar, scan_tar
from ..tasks import ShardTask

IN_STORE = 3  # batches that wait in the object store


def decode_batches(
    task: ShardTask, digest: str, views: Sequence[View], config: EngineConfig
) -> Iterator[Batch]:
    """Yields the batches of a shard in order, on another node; raises RemoteDecodeFailed if its tar
    is not the one of this index.
    """
    with fetched(task.tar, config.scratch_folder, task.size) as path, path.open("rb") as file:
        tar = Tar(file, task.size)
        rows, note = scan_tar(file, task.shard_rows)
        digests = [  # of an older program, too, which noted less
            sha256(ShardIndex.encode(task.fingerprint, task.number, rows, text))
            for text in {note, None}
        ]
        if digest not in digests:
            raise RemoteDecodeFailed(
                f"{task.tar}: the node that decodes reads {len(rows)} rows with index "
                f"{digests[0][:16]}..., the worker's has {digest[:16]}.... Both must see the same file"
            )
        for span in spans(len(rows), config.batch):
            batch = Batch.empty(span, views)
            load(rows, file.fileno(), batch, 0, span[1] - span[0])
            tar.check()
            yield batch


def decoded_elsewhere(
    task: ShardTask, index: ShardIndex, views: Sequence[View], config: EngineConfig
) -> Generator[Batch, None, None]:
    """Yields the batches of a shard from a task on some node with a CPU to spare, checked to be in
    order and without gaps.
    """
    ray: Any = importlib.import_module("ray")
    stream = ray.remote(decode_batches).options(
        num_cpus=1, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD",
        _generator_backpressure_num_objects=IN_STORE,
    ).remote(task, index.digest, list(views), config)  # fmt: skip
    try:
        yield from in_order(received(ray, stream, config.patience / 2), task, index, config.batch)
    finally:
        ray.cancel(stream)


def received(ray: Any, stream: Any, patience: float) -> Iterator[Batch]:
    """Yields what a streaming task sends, as it comes."""
    while True:
        until = time.monotonic() + patience
        while not ray.wait([stream], timeout=1.0, fetch_local=False)[0]:
            if time.monotonic() > until:
                raise RemoteDecodeFailed(
                    f"no batch came from another node for {patience:.0f} s. Is there a CPU that "
                    "no worker holds? engine.remote_decode needs some"
                )
        try:
            batch = ray.get(next(stream))
        except StopIteration:
            return
        except ray.exceptions.RayError as error:
            raise RemoteDecodeFailed(f"{type(error).__name__}: {error}") from None
        yield batch


def in_order(
    batches: Iterator[Batch], task: ShardTask, index: ShardIndex, size: int
) -> Iterator[Batch]:
    """Yields the batches, if they are all of a shard's, one after the other."""
    for span in spans(len(index.rows), size):
        batch = next(batches, None)
        if batch is None or batch.span != span:
            part = "the end" if batch is None else f"rows {batch.span}"
            raise RemoteDecodeFailed(f"{task.name}: {part} came, rows {span} were expected")
        # what comes from the object store cannot be written to, and torch wants to be able to
        images = {view: np.array(images) for view, images in batch.images.items()}
        yield replace(batch, images=images)
    if next(batches, None) is not None:
        raise RemoteDecodeFailed(f"{task.name}: more rows came than the tar has")
