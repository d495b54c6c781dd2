"""Columns are copied to stores and read from there while faults befall requests by chance.

A case is a store, a variant of columns and a seed. Every attempt ends with all that was asked for or
an error that has a name, and no COMPLETE record is there that speaks of what is not; once the faults
are over, the same command ends, and the column holds what was copied.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from shards import Column, ColumnSpec, ShardsError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.tools.copy import copy
from shards.tools.verify import logical_digest, verify
from tests.memory import MEMORY
from tests.proxy.azure import CONTAINER, Azure, point_to_azure
from tests.proxy.google import GOOGLE_BUCKET, Google, point_to_google
from tests.proxy.server import Backend, Proxy, Request
from tests.shards.objects import BUCKET, Server, point_to
from tests.shards.toy import moments_spec, row_ids, tokens_spec, write_column
from tests.soak.sweep import Case, Sweep

SEEDS = 60
ATTEMPTS = 8
ROWS = (70, 3)
LIMITS = Limits(1, stall=0.3, request=0.6, copy=1, give_up=2, backoff=0.01, max_backoff=0.05)
PART = 1 << 9  # of what is in memory, so that objects of toys are copied inside the store
PASSING = ("503", "500", "429 after 0", "cut", "close", "lost", "stall")
OF_READS = ("short", "flip", "whole")
STAYING = ("expired", "skewed", "403")
VARIANTS: dict[str, Callable[[], ColumnSpec]] = {
    "moments": lambda: moments_spec(2),
    "tokens": lambda: tokens_spec(2),
    "tokens blosc": lambda: tokens_spec(2, codec="blosc"),
    "moments tar": lambda: moments_spec(2, backend="webdataset"),
}
STORES = ("az", "gs", "s3")


def cases() -> list[Case]:
    return [(s, v, seed) for s in STORES for v in VARIANTS for seed in range(SEEDS)]


class Chance:
    """Draws the fault of each request; from one request on, credentials may be refused."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._rate = self._random.choice((0.02, 0.1, 0.3))
        self._refused = self._random.choice((None, None, self._random.randrange(200)))
        self._how = self._random.choice(STAYING)
        self._count = 0

    def __call__(self, request: Request, count: int) -> str | None:
        self._count += 1
        if self._refused is not None and self._refused <= self._count < self._refused + 20:
            return self._how
        draw = self._random.random()
        if request[0] == "PUT" and "/.tmp-" not in request[1] and draw > self._rate:
            return "pending"  # of Azure's copies alone
        if draw > self._rate:
            return None
        return self._random.choice(PASSING + (OF_READS if request[2] else ()))


@cache
def moto(process: int) -> Server:
    """An S3 server of this process."""
    return Server()


@contextmanager
def behind(store: str, chance: Chance, seed: int, folder: Path) -> Iterator[tuple[Proxy, str]]:
    """A proxy before a store, to which the environment leads, and a url in it."""
    in_memory = {"az": Azure, "gs": Google}
    backend: int | Backend = in_memory[store]() if store in in_memory else moto(os.getpid()).port
    proxy = Proxy(backend, chance, lasts=random.Random(seed).choice((0.0, 0.05, 0.3)))
    proxy.meanwhile = random.Random(seed).choice(("absent", "empty", "whole"))
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, proxy.port)
        point_to_azure(patch, proxy.port)
        point_to_google(patch, proxy.port)
        patch.setenv("LATENTBANK_CACHE", str(folder / "pages"))
        patch.setenv("LATENTBANK_CACHE_GB", random.Random(seed).choice(("0", "1")))
        if store in in_memory:
            patch.setattr("shards.store.upload.PART", PART)
        container = {"az": CONTAINER, "gs": GOOGLE_BUCKET, "s3": BUCKET}[store]
        try:
            yield proxy, f"{store}://{container}/{folder.name}"
        finally:
            proxy.close()


def check(store: str, variant: str, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="faults-") as name:
        folder = Path(name)
        near = write_column(folder / "near", VARIANTS[variant](), ROWS)
        chance = Chance(f"{store} {variant} {seed}")
        with behind(store, chance, seed, folder) as (proxy, url):
            for attempt in range(ATTEMPTS):
                if attempt == ATTEMPTS - 1:
                    proxy.fault = lambda request, count: None
                    time.sleep(proxy.lasts or 0)
                try:
                    copy(near, RemoteStore(url, LIMITS), threads=1 + seed % 4)
                    break
                except ShardsError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    require_honest(proxy, url)
            proxy.fault = lambda request, count: None
            assert verify(url, processes=1) == []
            assert logical_digest(url) == logical_digest(near)
            proxy.fault = Chance(f"reads {seed}")
            read(url, near)


def require_honest(proxy: Proxy, url: str) -> None:
    """A column that is said to be complete after a failed attempt is."""
    fault, proxy.fault = proxy.fault, lambda request, count: None
    if [name for name, _ in RemoteStore(url, LIMITS).list("complete") if name.endswith(".json")]:
        assert verify(url, processes=1) == []
    proxy.fault = fault


def read(url: str, near: Path) -> None:
    """Reads all rows while faults go on: the right ones, or an error that has a name."""
    ids = np.concatenate([row_ids(0, ROWS), row_ids(1, ROWS)])
    expected = rows_of(Column.open(near), ids)
    for _ in range(3):
        try:
            actual = rows_of(Column.open(RemoteStore(url, LIMITS)), ids)
        except ShardsError:
            continue
        assert actual == expected


def rows_of(column: Column, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> list[bytes]:
    try:
        return [np.ascontiguousarray(row).tobytes() for row in column.read(ids)]
    finally:
        column.close()


SWEEP = Sweep(
    "stores", "a store, a column and a seed of faults", cases, check, lambda case: f"{case[0]}, {case[1]}"
)  # fmt: skip
