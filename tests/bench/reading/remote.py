"""Samples a second from an object store, over those of plain requests by the same client.

    python -m tests.bench.reading.remote --json bench/remote.json

    plain           all objects by requests of 4 MiB, 16 at once: the limit of this client
    rows            one request for each row of the same order, 32 at once
    cold, warm      this program with a cache that holds the columns: its first epoch, its second
    small, none     its first epoch with a cache of a quarter of the columns, and with none
    staged          its second epoch over the same columns in a folder

The store is a folder behind nginx, or behind a small server of Python's where nginx is not
installed, at 0 and at 20 ms a request. Each way gets a process and an empty cache of its own; they
take turns, there and back, and ratios are of one round. Requests and bytes are the server's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.table import Table

from shards import exits, open_join
from shards.format.atomic import Json
from shards.read.stream import Stream
from tests.bench import turns
from tests.bench.cost import cpu_seconds, median_interval, paired, promise

from .readers import write_columns
from .samples import BATCH, Samples
from .store_server import BUCKET, Delayed, Store

ROUNDS, DELAYS = 4, (0.0, 0.02)
PAGE, PLAIN, ROWS = 4 << 20, 16, 32  # bytes of a plain request; requests at once
WAYS = {"plain": ["plain"], "rows": ["rows"], "cache": ["cold", "warm"], "small": ["small"],
        "none": ["none"], "staged": ["", "staged"]}  # what each process prints, in order  # fmt: skip


def child(way: str, place: str, rows: int) -> None:
    """Reads in one way; prints a line of JSON for each pass."""
    if way in ("plain", "rows"):
        show(*plain(place, way, rows))
        return
    start, cpu = perf_counter(), cpu_seconds()
    join = open_join(f"{place}/latents", f"{place}/text")
    order = join.order()
    epochs = len(WAYS[way])
    with Stream(join, order, position=0, global_batch=BATCH) as stream:
        for _ in range(epochs):
            first = size = 0.0
            for batch in islice(stream, rows // BATCH):
                first = first or perf_counter() - start
                size += batch.moments.nbytes + batch.tokens.nbytes
            show(perf_counter() - start, first, cpu_seconds() - cpu, size)
            start, cpu = perf_counter(), cpu_seconds()
    join.close()


def plain(place: str, way: str, rows: int) -> tuple[float, float, float, float]:
    """Fetches everything by requests of 4 MiB, or the rows of an epoch one by one, in (seconds, seconds
    to the first batch, CPU seconds, bytes). What is to be fetched is known before.
    """
    from concurrent.futures import ThreadPoolExecutor

    join = open_join(f"{place}/latents", f"{place}/text")
    ids = join.order().at(np.arange(rows))[1]
    pieces: list[tuple[Any, int, int]] = []
    for column in (join.latents, join.text):
        places = column.places(ids)
        handles = column._objects
        if way == "rows":
            pieces += [(handles.open(n), start, size) for n, start, size in places.rows() if size]
            continue
        for number in np.unique(places.object).tolist():
            handle = handles.open(number)
            pieces += [
                (handle, at, min(PAGE, handle.size - at)) for at in range(0, handle.size, PAGE)
            ]
    if way == "rows":  # of the batches in their order
        half = len(pieces) // 2
        pieces = [
            piece for pair in zip(pieces[:half], pieces[half:], strict=True) for piece in pair
        ]
    start, cpu, first, size = perf_counter(), cpu_seconds(), 0.0, 0.0
    batch = 2 * BATCH if way == "rows" else 1
    with ThreadPoolExecutor(ROWS if way == "rows" else PLAIN) as pool:
        for i, data in enumerate(pool.map(lambda piece: len(piece[0].fetch(*piece[1:])), pieces)):
            size += data
            if i + 1 == batch:
                first = perf_counter() - start
    return perf_counter() - start, first, cpu_seconds() - cpu, size


def show(seconds: float, first: float, cpu: float, size: float) -> None:
    print(json.dumps({"seconds": seconds, "first": first, "cpu": cpu, "bytes": size}), flush=True)


def passes(
    way: str, folder: Path, port: int, samples: Samples, store: Store
) -> Iterator[tuple[str, Json]]:
    """Runs one way in a process of its own; yields (name, figures) of each pass."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    gigabytes = {"small": samples.row_bytes(2) / 4e9, "none": 0}.get(way, 64)
    environment = os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1", "AWS_SKIP_SIGNATURE": "true", "LATENTBANK_CACHE": str(cache),
        "LATENTBANK_CACHE_GB": f"{gigabytes:.6f}", "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    place = str(folder / "bucket" / BUCKET) if way == "staged" else f"s3://{BUCKET}"
    command = [sys.executable, "-m", "tests.bench.reading.remote", way, place, str(samples.rows)]
    store.count()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for name, line in zip(WAYS[way], process.stdout, strict=True):
            requests, fetched = store.count()
            if name:
                yield name, json.loads(line) | {"requests": requests, "fetched": fetched}
    if process.returncode:
        raise RuntimeError(f"{way}: ended with exit code {process.returncode}")


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    samples = Samples(2 * BATCH, (4, 4, 4), 16) if light else Samples(1_024)
    bucket = folder / "bucket" / BUCKET
    bucket.mkdir(parents=True)
    write_columns(bucket, samples)
    figures: dict[str, dict[str, list[Json]]] = {}
    with ExitStack() as stack:
        store = stack.enter_context(Store(folder))
        for number in turns.turns("store", range(rounds)):
            for delay in DELAYS:
                port = stack.enter_context(Delayed(store.port, delay)).port if delay else store.port
                for way in list(WAYS)[:: -1 if number % 2 else 1]:
                    for name, found in passes(way, folder, port, samples, store):
                        of_delay = figures.setdefault(f"{1000 * delay:.0f} ms", {})
                        of_delay.setdefault(name, []).append(found)
    results: Json = {"server": store.name, "samples": samples.record(), "rounds": rounds}
    results["delays"] = {delay: summary(ways, samples) for delay, ways in figures.items()}
    results["promises"] = promises(results["delays"])
    return results, table(results)


def summary(ways: Mapping[str, list[Json]], samples: Samples) -> Json:
    """Returns the figures of each way, with its rate over that of plain requests of the same round."""

    def median(name: str, key: str) -> float:
        return median_interval([each[key] for each in ways[name]])[0]

    def rates(name: str) -> list[float]:
        return [each["bytes"] / each["seconds"] for each in ways[name]]

    payload = samples.row_bytes(2)
    return {
        name: {
            "over_plain": paired(rates(name), rates("plain")),
            "over_rows": paired(rates(name), rates("rows")),
            "over_staged": paired(rates(name), rates("staged")),
            "first_s": median(name, "first"),
            "requests_a_sample": median(name, "requests") / samples.rows,
            "bytes_a_byte": median(name, "fetched") / payload,
            "cpu_s_a_gb": 1e9 * median(name, "cpu") / median(name, "bytes"),
            "passes": each,
        }
        for name, each in ways.items()
    }


def promises(delays: Mapping[str, Json]) -> list[Json]:
    near, far = delays["0 ms"], delays["20 ms"]
    made = [
        promise("near, cold over plain requests", near["cold"]["over_plain"]["ratio"], ">=", 0.8),
        promise("near, cold, bytes fetched a byte", near["cold"]["bytes_a_byte"], "<=", 1.05),
        promise("near, warm over staged", near["warm"]["over_staged"]["ratio"], ">=", 0.9),
    ]
    for name in ("cold", "small", "none"):
        made.append(promise(f"20 ms, {name}, first batch, s", far[name]["first_s"], "<=", 1))
    for name in ("small", "none"):
        ratio = far[name]["over_rows"]["ratio"]
        made.append(promise(f"20 ms, {name} over a request a row", ratio, ">=", 0.8))
    return made


def table(results: Json) -> Table:
    shown = Table(
        "delay", "way", "rate over plain", "95 % interval", "first batch, s", "requests a sample",
        "bytes a byte", "CPU s a GB", title=results["server"],
    )  # fmt: skip
    for delay, ways in results["delays"].items():
        for name, each in ways.items():
            rate = each["over_plain"]
            shown.add_row(
                delay, name, f"{rate['ratio']:.2f}", f"{rate['ratio_low']:.2f} to {rate['ratio_high']:.2f}",
                *(f"{each[key]:.2f}" for key in ("first_s", "requests_a_sample", "bytes_a_byte", "cpu_s_a_gb")),
            )  # fmt: skip
    return shown


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] in WAYS and re.fullmatch(r"\d+", sys.argv[3]):
        child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        return 0
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measures, prints, writes down."""
    return turns.measured({"remote": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
