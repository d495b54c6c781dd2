"""What reading costs: finding the rows of a step anywhere in a run, and streaming them from a column.

    make bench

CPU seconds, the best of several turns; files are warm in the page cache: the price of the code, not of a disk.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shards import (
    ColumnSpec,
    Layout,
    Norm,
    Order,
    ShardWriter,
    create_column,
    open_join,
    put_complete,
    put_empty,
)
from shards.stream import Stream

BATCH, ROWS, TOKENS, WIDTH = 1_024, 4_096, 100, 384


def cpu_seconds(work: Callable[[], object], turns: int = 5) -> float:
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def order() -> dict[str, float]:
    """Rows of one batch of 1,024 out of 32 million, early and late in a run."""
    found = Order([np.full(1_000_000, 2**32 - 1, np.uint32)], seed=0)
    early, late = (
        cpu_seconds(lambda p=position: found(p, BATCH, 1, 0)) for position in (0, 64 * 10**9)
    )
    return {"ms_at_position_0": 1e3 * early, "ms_at_position_64e9": 1e3 * late}


def write_columns(folder: Path) -> None:
    """A 256-pixel latent column and a text column of 100 tokens a row, full of random bits."""
    generator = np.random.default_rng(0)
    moments = generator.normal(size=(ROWS, 32, 32, 32)).astype(np.float16)
    tokens = [generator.integers(0, 2**14, (TOKENS, WIDTH)).astype(np.uint16) for _ in range(ROWS)]
    identity = {"source": "bench"}
    latents = ColumnSpec(identity, Layout("moments", (32, 32, 32), 1), Norm((0.0,), (1.0,)))
    text = ColumnSpec(identity, Layout("tokens", (TOKENS, WIDTH), 1), None, 2)
    for name, spec, values in (("latents", latents, moments), ("text", text, tokens)):
        digest = create_column(folder / name, spec)
        if spec is text:
            put_empty(folder / name, spec, tokens[0][:2])
        writer = ShardWriter(folder / name, spec, digest, 0, ROWS, "index")
        for start in range(0, ROWS, 1_024):
            writer.put_block(values[start : start + 1_024], np.zeros(1_024, np.uint8))
        writer.commit({})
        put_complete(folder / name, digest, 1, allow_failed=False)


def stream(folder: Path) -> dict[str, float]:
    """Samples a CPU second in the order of the run, against reading the same bytes end to end."""
    join = open_join(folder / "latents", folder / "text")
    epoch = Order([join.words]).epoch_samples
    values = (folder / "latents" / "moments" / "c", folder / "text" / "tokens" / "c")
    files = [path for place in values for path in place.rglob("*") if path.is_file()]

    def ours(position: int) -> None:
        with Stream(join, Order([join.words]), position=position, global_batch=BATCH) as batches:
            for _ in range(ROWS // BATCH):
                next(batches)

    def raw() -> None:
        buffer = bytearray(1 << 22)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return {
        "samples_per_cpu_second": ROWS / cpu_seconds(lambda: ours(epoch)),
        "with_checksums_as_in_the_first_epoch": ROWS / cpu_seconds(lambda: ours(0)),
        "plain_file_reads": ROWS / cpu_seconds(raw),
        "kilobytes_per_sample": sum(path.stat().st_size for path in files) / ROWS / 1e3,
    }


if __name__ == "__main__":
    print(json.dumps({"order": order()}))
    with tempfile.TemporaryDirectory() as folder:
        write_columns(Path(folder))
        print(json.dumps({"stream": stream(Path(folder))}))
