"""What a store refuses: too many requests, containers that do not exist, credentials and clocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from shards import Column
from shards.errors import StoreError
from shards.store.client import Limits
from shards.store.http import WebStore
from shards.store.object_store import RemoteStore
from shards.store.throttle import seconds_asked
from shards.tools.copy import copy
from shards.tools.verify import verify
from tests.proxy.azure import ACCOUNT, CONTAINER, Azure, Blob, point_to_azure
from tests.proxy.google import GOOGLE_BUCKET, Google, point_to_google
from tests.proxy.server import AsksToWait, Message, Proxy
from tests.shards.objects import BUCKET, Server, point_to
from tests.shards.toy import moments_spec, write_column

QUICK = Limits(30, stall=60, request=60, copy=60, give_up=60, backoff=0.01, max_backoff=0.1)
SHORT = Limits(30, stall=60, request=60, copy=60, give_up=1, backoff=0.01, max_backoff=0.1)
LARGE = 9 << 20  # more than one part


class Files:
    """A web server that has one file under every name."""

    def __init__(self) -> None:
        self.azure = Azure()
        self.azure.containers[CONTAINER]["x"] = Blob(b"data")

    def answer(self, request: Message) -> Message:
        return self.azure.answer(replace(request, path=f"/{ACCOUNT}/{CONTAINER}/x"))


@pytest.fixture(params=["s3", "az", "gs", "http"])
def store(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Limits], RemoteStore]]:
    """Opens a store of each kind behind a proxy, `proxy`; there is an object `x` in it."""
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "cache"))
    backends = {"s3": server.port, "az": Azure(), "gs": Google(), "http": Files()}
    backend = backends[request.param]
    proxy = Proxy(backend)
    point_to(monkeypatch, proxy.port)
    point_to_azure(monkeypatch, proxy.port)
    point_to_google(monkeypatch, proxy.port)
    request.node.proxy = proxy
    name = re.sub("[^a-z0-9]+", "-", request.node.name)

    def open_it(limits: Limits) -> RemoteStore:
        if request.param == "http":
            return WebStore(f"http://127.0.0.1:{proxy.port}/a folder", limits)
        bucket = {"s3": BUCKET, "az": CONTAINER, "gs": GOOGLE_BUCKET}[request.param]
        return RemoteStore(f"{request.param}://{bucket}/{name}", limits)

    if request.param != "http":
        open_it(QUICK).replace("x", b"data")
    yield open_it
    proxy.close()


@pytest.fixture
def proxy(store: object, request: pytest.FixtureRequest) -> Proxy:
    proxy: Proxy = request.node.proxy
    return proxy


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    store: Callable[[Limits], RemoteStore], proxy: Proxy, status: str
) -> None:
    proxy.fault = asking = AsksToWait(status)
    assert store(QUICK).read("x") == b"data"
    asking.check_obeyed()


def test_a_wait_ends_with_the_limit_and_is_said(
    store: Callable[[Limits], RemoteStore], proxy: Proxy
) -> None:
    proxy.fault = lambda request, count: "429 after 3600"
    message = r"429 Too Many.*The server asked to wait for 3600 s\."
    with proxy.given_up(SHORT.give_up), pytest.raises(StoreError, match=message):
        store(SHORT).read("x")


def test_a_server_that_does_not_say_how_long_is_not_asked_again(
    store: Callable[[Limits], RemoteStore], proxy: Proxy
) -> None:
    proxy.fault = lambda request, count: "503"
    with pytest.raises(StoreError, match="503 Service Unavailable"):
        store(SHORT).read("x")
    assert sum(n for (method, _, _), n in proxy.seen.items() if method == "HEAD") == 1


def test_what_is_asked_for() -> None:
    assert [seconds_asked(v) for v in ("7", "0", "-1", "soon", None)] == [7, 0, 0, None, None]
    assert 50 < (seconds_asked(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert seconds_asked(formatdate(0, usegmt=True)) == 0


def test_a_token_is_not_shown_where_a_server_leads_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Leads:
        def answer(self, request: Message) -> Message:
            return Message({"location": f"http://127.0.0.1:{other.port}/x"}, status=302)

    other = Proxy(Files())
    first = Proxy(Leads())
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{first.port}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    # the second answer redirects: the server answers again, so the wait ends, and nobody follows
    first.fault = lambda request, count: "429" if request[0] == "GET" else None
    with pytest.raises(StoreError):
        WebStore(f"http://127.0.0.1:{first.port}", SHORT).read("x")
    assert other.seen == {}
    first.close()
    other.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("expired", "The credentials have expired, or the clock of this machine .* renew A"),
        ("skewed", "refuses what is signed at another time than its own: set the clock of this"),
        ("unsigned", "Check A[A-Z_]+ and A.*, and what they permit. They may have expired, or the"),
    ],
)
@pytest.mark.parametrize("store", ["s3", "az"], indirect=True)
def test_credentials_and_clocks(
    store: Callable[[Limits], RemoteStore], proxy: Proxy, fault: str, message: str
) -> None:
    proxy.fault = lambda request, count: fault
    for act in (lambda s: s.read("x"), lambda s: s.put_if_absent("y", b""), lambda s: s.list()):
        before = proxy.requests()
        with pytest.raises(StoreError, match=message):
            act(store(QUICK))
        assert proxy.requests() - before == 1  # it does not pass
    with pytest.raises(StoreError, match="Check A.* They may have expired, or the clock"):
        store(QUICK).size("x")  # an answer to HEAD has no text


@pytest.mark.parametrize("store", ["s3", "az", "gs"], indirect=True)
def test_credentials_that_run_out_stop_a_copy_which_goes_on_with_new_ones(
    store: Callable[[Limits], RemoteStore], proxy: Proxy, tmp_path: Path
) -> None:
    write_column(tmp_path / "near", moments_spec(2), (1100, 40))
    target = store(QUICK).child("column")
    requests = 0

    def fault(request: tuple[str, str, str], count: int) -> str | None:
        nonlocal requests
        requests += 1
        return "expired" if requests > 25 else None

    proxy.fault = fault
    with pytest.raises(StoreError, match="expired"):
        copy(tmp_path / "near", target, threads=1)
    proxy.fault = lambda request, count: None
    assert len(target.list()) > 3
    assert target.list("complete") == []
    copy(tmp_path / "near", target, threads=1)
    assert verify(target.url, processes=1) == []


@pytest.mark.parametrize("store", ["s3", "az", "gs"], indirect=True)
def test_a_container_that_does_not_exist_is_named(
    store: Callable[[Limits], RemoteStore], tmp_path: Path
) -> None:
    scheme = store(QUICK).url.partition("://")[0]
    write_column(tmp_path / "near", moments_spec(1), (70,))
    elsewhere = RemoteStore(f"{scheme}://no-such-place/x", QUICK)
    acts: list[Callable[[], object]] = [
        lambda: elsewhere.read("x"),
        lambda: elsewhere.put_if_absent("x", b""),
        lambda: elsewhere.replace("x", b""),
        lambda: elsewhere.list(),
        lambda: elsewhere.folders(),
        lambda: Column.open(elsewhere),
        lambda: copy(tmp_path / "near", elsewhere),
        lambda: copy(elsewhere, tmp_path / "back"),
        lambda: stage(elsewhere, bytes(LARGE)),
    ]
    for act in acts:
        with pytest.raises(
            StoreError, match=f"There is no {scheme}://no-such-place: check the url"
        ):
            act()


def stage(store: RemoteStore, data: bytes) -> bool:
    with store.staged("values") as file:
        file.write(data)
        return file.publish()


@pytest.mark.parametrize("store", ["s3", "az", "gs"], indirect=True)
def test_a_server_that_ignores_ranges_ends_in_an_error(
    store: Callable[[Limits], RemoteStore], proxy: Proxy
) -> None:
    proxy.fault = lambda request, count: "whole"
    opened = store(SHORT)
    message = "gives whole objects where a part is asked for"
    with proxy.given_up(SHORT.give_up), pytest.raises(StoreError, match=message):
        opened.preadv(opened.open("x"), [memoryview(bytearray(2))], 1)
    proxy.fault = lambda request, count: "whole" if count < 3 else None  # an old cache before it
    buffer = bytearray(2)
    opened.preadv(opened.open("x"), [memoryview(buffer)], 1)
    assert buffer == b"at"


@pytest.mark.parametrize("store", ["s3", "az", "gs"], indirect=True)
def test_an_object_whose_tag_changes_is_another(
    store: Callable[[Limits], RemoteStore], proxy: Proxy
) -> None:
    opened = store(QUICK)
    handle = opened.open("x", cached=False)
    opened.replace("x", b"atad")
    with pytest.raises(StoreError, match="replaced while it was open"):
        opened.preadv(handle, [memoryview(bytearray(2))], 1)


# What the environment and urls say ----------------------------------------------------------------


WRONG = {
    "s3": [
        ("AWS_ENDPOINT_URL", ""),
        ("AWS_ENDPOINT_URL", "localhost"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("AWS_ACCESS_KEY_ID", "a-line\n"),
        ("AWS_ALLOW_HTTP", "maybe"),
        ("AWS_SKIP_SIGNATURE", "perhaps"),
        ("AWS_COPY_IF_NOT_EXISTS", "sometimes"),
    ],
    "az": [("AZURE_STORAGE_ACCOUNT_KEY", "no base64!"), ("AZURE_ENDPOINT", "nowhere")],
    "gs": [("GOOGLE_BASE_URL", "nowhere"), ("GOOGLE_BEARER_TOKEN", "a-line\n")],
}


@pytest.mark.parametrize(
    ("scheme", "name", "value"), [(s, *pair) for s, pairs in WRONG.items() for pair in pairs]
)
def test_a_variable_that_makes_no_sense_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, scheme: str, name: str, value: str
) -> None:
    point_to(monkeypatch, 9)
    point_to_azure(monkeypatch, 9)
    point_to_google(monkeypatch, 9)
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=f"Correct the url, or the variable {name[:3]}.*_... that"):
        RemoteStore(f"{scheme}://shelf/x", SHORT).read("column.json")


@pytest.mark.parametrize("path", ["./x", "a/../x", "x/..", "a\tb", "a\nb", "/x"])
def test_a_url_that_names_no_object_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match=r"expected s3://<bucket>/<path> without empty parts"):
        RemoteStore(f"s3://shelf/{path}")


@pytest.mark.parametrize("value", ["-5", "64GB", "nan", "inf"])
def test_a_size_of_the_cache_that_is_none_is_refused(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    server.take(write_column(tmp_path / "near", moments_spec(1), (8,)), url)
    monkeypatch.setenv("LATENTBANK_CACHE_GB", value)
    with pytest.raises(StoreError, match=f"found '{value}', expected a number of gigabytes"):
        Column.open(url).read([0])
