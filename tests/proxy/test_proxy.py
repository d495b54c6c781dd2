"""The proxy does what it says: tests of the store would pass beside faults that never come."""

import http.client
import time
from collections.abc import Iterator

import pytest

from tests.proxy.azure import ACCOUNT, CONTAINER, Azure, Blob
from tests.proxy.server import LATE, Proxy

ROOT = f"/{ACCOUNT}/{CONTAINER}"
DATA = bytes(range(100))


@pytest.fixture
def azure() -> Azure:
    azure = Azure()
    azure.containers[CONTAINER]["a"] = Blob(DATA)
    return azure


@pytest.fixture
def proxy(azure: Azure) -> Iterator[Proxy]:
    proxy = Proxy(azure)
    yield proxy
    proxy.close()


def ask(
    proxy: Proxy, method: str, name: str, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, f"{ROOT}/{name}", headers=names)
    answer = connection.getresponse()
    try:
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_faults_are_as_they_are_named(proxy: Proxy) -> None:
    status, headers, whole = ask(proxy, "GET", "a")
    assert (status, whole) == (200, DATA)
    assert ask(proxy, "GET", "a", Range="bytes=3-5")[2] == DATA[3:6]
    fault = ""
    proxy.fault = lambda request, count: fault
    fault = "429 after 7"
    status, late, _ = ask(proxy, "GET", "a")
    assert (status, late["Retry-After"]) == (429, "7")
    fault = "whole"
    assert ask(proxy, "GET", "a", Range="bytes=3-5")[::2] == (200, DATA)
    fault = "flip"
    assert ask(proxy, "GET", "a")[2] == b"\x01" + DATA[1:]
    fault = "changed"
    assert ask(proxy, "GET", "a")[1]["ETag"] != headers["ETag"]
    fault = "short"
    assert ask(proxy, "GET", "a", Range="bytes=3-5")[2] == DATA[3:5]
    fault = "cut"
    with pytest.raises(http.client.IncompleteRead):
        ask(proxy, "GET", "a")
    for fault in ("close", "lost"):
        with pytest.raises(http.client.RemoteDisconnected):
            ask(proxy, "DELETE", "a" if fault == "lost" else "b")
    fault = ""
    assert ask(proxy, "GET", "a")[0] == 404  # the request was done before its answer was lost
    assert proxy.seen["GET", f"{ROOT}/a", "bytes=3-5"] == proxy.gets() == 3


def test_who_goes_on_after_a_fault_has_not_given_up(proxy: Proxy) -> None:
    with pytest.raises(AssertionError, match="no request met a fault"), proxy.given_up(0):
        ask(proxy, "GET", "a")
    proxy.fault = lambda request, count: "503"
    with proxy.given_up(0):
        ask(proxy, "GET", "a")
    with pytest.raises(AssertionError, match=r"given up after 0\.\d s"), proxy.given_up(-LATE):
        ask(proxy, "GET", "a")


def test_a_delay_is_of_every_answer_and_of_none_after_it(proxy: Proxy) -> None:
    proxy.delay = 0.05
    start = time.monotonic()
    for _ in range(3):
        ask(proxy, "HEAD", "a")
    assert time.monotonic() - start >= 0.15
    assert (proxy.open, proxy.most) == (0, 1)


@pytest.mark.parametrize(
    ("meanwhile", "head", "get"),
    [("absent", (404, 0), 404), ("empty", (200, 0), 200), ("whole", (200, 100), 409)],
)
def test_copies_that_are_pending(
    proxy: Proxy, azure: Azure, meanwhile: str, head: tuple[int, int], get: int
) -> None:
    proxy.meanwhile, proxy.fault = meanwhile, lambda request, count: "pending"
    assert ask(proxy, "HEAD", "a")[1]["Content-Length"] == "100"
    source = f"http://127.0.0.1{ROOT}/a"
    status, headers, _ = ask(proxy, "PUT", "b", x_ms_copy_source=source)
    assert (status, headers["x-ms-copy-status"]) == (202, "pending")
    status, headers, _ = ask(proxy, "HEAD", "b")
    assert status == head[0]
    assert status == 404 or int(headers["Content-Length"]) == head[1]
    assert ask(proxy, "GET", "b")[0] == get
    assert "b" not in azure.containers[CONTAINER]
    proxy.finish()
    assert ask(proxy, "GET", "b")[2] == DATA
    # one whose source is removed meanwhile has failed
    ask(proxy, "PUT", "c", x_ms_copy_source=source)
    ask(proxy, "DELETE", "a")
    proxy.finish("/c")
    status, headers, _ = ask(proxy, "HEAD", "c")
    assert (status, headers["x-ms-copy-status"]) == (
        (404, None) if meanwhile == "absent" else (200, "failed")
    )
