"""One reader in one process: pinned to a core, it makes passes over the samples as it is told to.

    stdin   {"order": "shuffled", "check": false}                      a pass; an empty line ends
    stdout  {"seconds": ..., "cpu_seconds": ..., "rows": ..., "bytes": ...}     what it took

Opening a store is not timed, nor finding the rows that raw is to read, nor the first 8 batches of
a pass, in which threads start and memory is touched for the first time. Everything else is: order,
reading, decoding, collating and the reader's own threads.

Needs numpy and torch only: the peers' environment runs this file too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .samples import BATCH, Batch, Ring, Samples, digest_of_all, digests

ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS")
}
SKIPPED = 8  # batches at the start of a pass; an eighth of a pass if that is fewer
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """How to go over the samples with one library.

    `open(folder, samples, order, ring)` gives an iterator that has not begun to read; `ring` is
    memory for its batches, the same in every pass. `store` names the writer of what it reads.
    """

    open: Callable[[Path, Samples, str, Ring], Iterator[Batch]]
    store: str
    columns: int = 2
    orders: tuple[str, ...] = ("sequential", "shuffled")


Writers = Mapping[str, Callable[[Path, Samples], None]]


def one_pass(
    reader: Reader, folder: Path, samples: Samples, ring: Ring, order: str, check: bool
) -> Json:
    """Go over all samples once. With `check` every row is hashed too, and the time means nothing."""
    batches = reader.open(folder, samples, order, ring)
    found: list[str] = []
    skipped = min(SKIPPED, samples.rows // BATCH // 8) * BATCH
    count = size = 0
    seconds = used = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        count += len(batch.moments)
        if check:
            found.extend(digests(batch))
        if count == skipped:
            start, cpu = time.perf_counter(), time.process_time()
        if count > skipped:
            size += sum(tensor.nbytes for tensor in batch[:2] if tensor is not None)
        if count == samples.rows:  # what a library does at its end is not timed
            seconds, used = time.perf_counter() - start, time.process_time() - cpu
    if count != samples.rows:
        raise ValueError(f"{count} samples came, {samples.rows} stand in the store")
    result: Json = {
        "seconds": seconds,
        "cpu_seconds": used,
        "rows": count - skipped,
        "bytes": size,
    }
    return result | ({"digest": digest_of_all(found)} if check else {})


def serve(reader: Reader, folder: Path, samples: Samples, core: int, answers: IO[str]) -> None:
    """Answer each line of stdin with a pass, until stdin ends."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    ring = Ring(samples, reader.columns)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        asked = json.loads(line)
        result = one_pass(reader, folder, samples, ring, asked["order"], asked["check"])
        print(json.dumps(result), file=answers, flush=True)


def main(readers: Mapping[str, Reader], writers: Writers, arguments: list[str]) -> None:
    """`write STORE FOLDER SAMPLES` or `read READER FOLDER SAMPLES CORE`."""
    verb, name, folder, record = arguments[:4]
    samples = Samples(**json.loads(record))
    # libraries print as they like: what goes to stdout is sent to stderr, and answers keep stdout
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if verb == "write":
        writers[name](Path(folder), samples)
    else:
        serve(readers[name], Path(folder), samples, int(arguments[4]), answers)
