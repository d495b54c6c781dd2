from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy.server import Proxy
from tests.shards.objects import Server, point_to


@pytest.fixture
def proxy(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The environment leads to the proxy, which leads to the server."""
    proxy = Proxy(server.port)
    point_to(monkeypatch, proxy.port)
    yield proxy
    proxy.close()
