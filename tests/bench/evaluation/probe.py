"""What a probe of a column takes: CPU seconds and peak memory of `shards.probe` on columns of three shapes.

    python -m tests.bench.evaluation.probe --json FILE     # four minutes of one core, 1.8 GB of disk
    python -m tests.bench.evaluation.probe --light         # toy sizes: that it runs, and nothing else

Each shape is a column of moments or latents of 2,048 rows, read and probed in a process of its own with one thread: all
figures, with a text of 384 features. What is promised: 10 s and 1 GB up to 16 x 32 x 32 and 128 x 16 x 16, 180 s and
2 GB for 768 x 16 x 16, of which 48 frequencies are looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from shards import Column, ColumnSpec, Layout, Norm, ShardWriter, create_column, put_complete
from shards.console import render
from shards.probe import ColumnRows, common_rows, panel

ROWS, TEXT = 2048, 384
# channels, height, width; whether moments; seconds and bytes that are promised
SHAPES = (
    (16, 32, 32, True, 10.0, 1e9),
    (128, 16, 16, True, 10.0, 1e9),
    (768, 16, 16, False, 180.0, 2e9),
)
LIGHT = ((4, 8, 8, True, 10.0, 1e9), (8, 4, 4, False, 10.0, 1e9))
SIGMAS = [0.9746, 0.9190, 0.8523, 0.7714, 0.6712, 0.5438, 0.3759, 0.1672]

Json = dict[str, Any]


def write_latents(path: Path, channels: int, height: int, width: int, moments: bool) -> None:
    """A column of ROWS rows of normal values."""
    kind = "moments" if moments else "latents"
    layout = Layout(kind, (channels * (1 + moments), height, width), 1, ROWS)
    spec = ColumnSpec({"kind": kind, "source": "bench"}, layout, Norm((0.0,), (1.0,)))
    digest = create_column(path, spec)
    writer = ShardWriter(path, spec, digest, 0, ROWS, "bench")
    chance = np.random.default_rng(0)
    for _ in range(0, ROWS, 1024):
        values = chance.standard_normal((1024, *layout.row_shape), np.float32).astype(np.float16)
        writer.put_block(values, np.zeros(1024, np.uint8))
    writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)


def probed(path: Path) -> Json:
    """Probes a column in this process, which does nothing else; returns its cost."""
    start = time.process_time()
    column = Column.open(path)
    rows = common_rows([column])
    text = np.random.default_rng(1).standard_normal((len(rows), TEXT)).astype(np.float32)
    record = panel(ColumnRows(column, rows), {"fixed": SIGMAS}, text, groups=rows % 7).record()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    seconds = time.process_time() - start
    return {"cpu_s": seconds, "peak_bytes": peak, "linear_reference": record["linear_reference"]}


def bench(args: argparse.Namespace) -> None:
    """Measures each shape, prints a table, and writes the JSON where one is named."""
    from rich.table import Table

    results = []
    table = Table("shape", "CPU s", "promised", "peak GB", "promised ")
    for channels, height, width, moments, seconds, size in LIGHT if args.light else SHAPES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "column"
            write_latents(path, channels, height, width, moments)
            words = [sys.executable, "-m", "tests.bench.evaluation.probe", "--column", str(path)]
            threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
            end = subprocess.run(words, env=os.environ | threads, capture_output=True, check=True)
        result = {"shape": [channels, height, width], **json.loads(end.stdout)}
        result["promised"] = {"cpu_s": seconds, "peak_bytes": size}
        results.append(result)
        table.add_row(
            f"{channels} x {height} x {width}", f"{result['cpu_s']:.1f}", f"{seconds:.0f}",
            f"{result['peak_bytes'] / 1e9:.2f}", f"{size / 1e9:.0f}",
        )  # fmt: skip
    print(render(table))
    if args.json:
        args.json.write_text(json.dumps({"probe": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="of the columns, which are deleted")
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--column", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.column:
        print(json.dumps(probed(args.column)))
    else:
        bench(args)


if __name__ == "__main__":
    main()
