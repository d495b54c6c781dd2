"""How many requests reading a column takes, counted by a proxy before a real S3 protocol server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.server import Proxy
from tests.shards.objects import Server, point_to
from tests.shards.toy import moments_spec, write_column


@pytest.fixture
def proxy(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The environment leads to the proxy, which leads to the server."""
    proxy = Proxy(server.port)
    point_to(monkeypatch, proxy.port)
    yield proxy
    proxy.close()


FEW_FILES = """
import resource, sys
import numpy as np
from shards import Column
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
column = Column.open(sys.argv[1])
ids = 2048 * np.arange(len(column.snapshot.rows))
first = column.read(ids)
print("read", flush=True)
sys.stdin.readline()
for _ in range(3):
    rows = np.random.default_rng(0).permutation(ids)
    again = column.read(rows)
    assert again[np.argsort(rows)].tobytes() == first.tobytes()
    column.hint(rows)
print("read", flush=True)
"""


def test_objects_that_were_read_are_open_whatever_the_limit_of_files(
    server: Server, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    """32 objects, where half of 48 files are a column's share."""
    server.take(write_column(tmp_path / "local", moments_spec(32), (1,) * 32), url)
    with subprocess.Popen(
        [sys.executable, "-c", FEW_FILES, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "read\n"
        before = dict(proxy.seen)
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "read\n"
        assert proxy.seen == before
    assert reader.returncode == 0
