"""What a large run costs before its first batch: opening columns of 5,000 shards and 32 million
rows, and finding the rows of a batch at the start of a run and 10^9 samples on.

    python -m tests.bench.reading.scale write FOLDER
    python -m tests.bench.reading.scale measure FOLDER

The columns are records without values: opening reads nothing else. `measure` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from shards.column.commits import Commit, Snapshot
from shards.column.writer import create_column
from shards.format.atomic import put_if_absent, seal, sha256
from shards.format.layout import ZARR_ROWS, ColumnSpec, Layout, Status
from shards.format.norm import Norm
from shards.read.opening import open_join
from shards.read.stream import Stream

from .readers import STORE
from .samples import BATCH

SHARDS, SHARD_ROWS = 5_000, 6_400
FAR = 10**9
NAMES = ("latents", "text")


def write_records(folder: Path, shards: int = SHARDS) -> None:
    """column.json and COMPLETE of a latent and a text column, as encoding 5,000 tars leaves them."""
    identity = {"source": "records of the bench"}
    layouts = Layout("moments", (32, 32, 32), shards), Layout("tokens", (256, 2048), shards)
    norms = Norm((0.0,), (1.0,)), None
    for name, layout, norm in zip(NAMES, layouts, norms, strict=True):
        spec = ColumnSpec(identity, layout, norm, 1 if layout.ragged else None)
        digest = create_column(folder / name, spec)
        commits = [commit(name, shard, digest) for shard in range(shards)]
        snapshot = Snapshot.of(digest, shards, commits, {})
        base = folder / name / "complete" / snapshot.digest
        put_if_absent(base.with_suffix(".valid"), snapshot.valid_mask.astype("<u4").tobytes())
        put_if_absent(base.with_suffix(".json"), seal(snapshot.record(digest)))


def commit(name: str, shard: int, column: str) -> Commit:
    """A shard with one picture that is cut off and two without caption."""
    not_ok = {
        "latents": (shard % 6_000, 1, Status.TRUNCATED),
        "text": (100 + shard % 5_000, 2, Status.CAPTION_MISSING),
    }[name]
    blocks = tuple(
        sha256(f"{name} {shard} {b}".encode()) for b in range(-(-SHARD_ROWS // ZARR_ROWS))
    )
    index = sha256(f"index {shard}".encode())
    return Commit(shard, SHARD_ROWS, (not_ok,), (), blocks, index, column, {})


def status_mb(field: str) -> float:
    """A field of /proc/self/status, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1e3


def opening(folder: Path) -> dict[str, float]:
    """Seconds and MB of opening and joining two columns, and of the first rows of a run on them."""
    before, start = status_mb("VmRSS"), time.perf_counter()
    join = open_join(folder / "latents", folder / "text")
    result = {"open_join_s": time.perf_counter() - start}
    start = time.perf_counter()
    order = join.order()
    result["order_s"] = time.perf_counter() - start
    result["rows"] = float(order.sources[0].valid)
    for name, position in (("0", 0), ("1e9", FAR)):
        start = time.perf_counter()
        order(position, BATCH)
        result[f"first_rows_at_{name}_s"] = time.perf_counter() - start
        start = time.process_time()
        for step in range(1, 33):
            order(position + step * BATCH, BATCH)
        per_batch = (time.process_time() - start) / 32
        result[f"rows_of_a_batch_at_{name}_ms"] = 1e3 * per_batch
    return result | {"peak_rss_mb": status_mb("VmHWM") - before}


def first_batches(folder: Path) -> dict[str, float]:
    """Seconds to the first batch of a stream over the columns of the bench."""
    result = {}
    for name, position in (("0", 0), ("1e9", FAR)):
        start = time.perf_counter()
        join = open_join(folder / "latents", folder / "text")
        with Stream(join, join.order(), position=position, global_batch=BATCH) as stream:
            next(stream)
            result[f"first_batch_at_{name}_s"] = time.perf_counter() - start
    return result


def main(verb: str, folder: Path) -> None:
    """`write` and `measure` are two processes: what writing takes in memory is not counted."""
    if verb == "write":
        write_records(folder / "records")
        return
    result = opening(folder / "records")
    if (folder / STORE).exists():
        result |= first_batches(folder / STORE)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
