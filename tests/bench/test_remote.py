"""The bench of object stores: what is served, counted and made of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bench.reading import remote
from tests.bench.reading.readers import write_columns
from tests.bench.reading.samples import BATCH, Samples
from tests.bench.reading.store_server import BUCKET, Delayed, Store

SAMPLES = Samples(2 * BATCH, (4, 4, 4), 16)


@pytest.mark.parametrize("nginx", [True, False])
def test_every_byte_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nginx: bool
) -> None:
    """The first epoch fetches all, the second nothing; also where there is no nginx."""
    if not nginx:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    bucket = tmp_path / "bucket" / BUCKET
    bucket.mkdir(parents=True)
    write_columns(bucket, SAMPLES)
    with Store(tmp_path) as store, Delayed(store.port, 0.001) as late:
        found = dict(remote.passes("cache", tmp_path, late.port, SAMPLES, store))
    assert list(found) == ["cold", "warm"]
    payload = SAMPLES.row_bytes(2)
    assert [each["bytes"] for each in found.values()] == [payload, payload]
    assert payload < found["cold"]["fetched"] < 1.2 * payload
    assert (found["warm"]["fetched"], found["warm"]["requests"]) == (0, 0)
    assert 0 < found["cold"]["first"] < found["cold"]["seconds"]


def test_ratios_are_of_one_round() -> None:
    def found(seconds: float) -> dict[str, Any]:
        return {
            "bytes": 100, "seconds": seconds, "first": 0.5, "cpu": 1.0, "requests": 256,
            "fetched": SAMPLES.row_bytes(2),
        }  # fmt: skip

    ways = {name: [found(2), found(20)] for names in remote.WAYS.values() for name in names if name}
    ways["cold"] = [found(4), found(40)]
    made = remote.summary(ways, SAMPLES)
    assert made["cold"]["over_plain"]["ratios"] == [0.5, 0.5]
    assert made["cold"]["requests_a_sample"] == 2
    assert made["cold"]["bytes_a_byte"] == 1
    promises = remote.promises({"0 ms": made, "20 ms": made})
    assert [each["holds"] for each in promises] == [False] + [True] * 7
