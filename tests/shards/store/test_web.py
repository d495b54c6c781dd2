"""Files of a real web server on loopback: read by range, never written, and who sees the token."""

import pickle
import re
from collections.abc import Callable, Iterator

import pytest

from shards.errors import StoreError
from shards.store.client import Limits, web_headers
from shards.store.http import WebStore
from shards.store.open import open_store
from tests.encode.web import Web, serving

QUICK = Limits(1, stall=0.5, request=2, give_up=5, backoff=0.01, max_backoff=0.1)
DATA = bytes(range(256)) * 400


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(**{"some folder/é.tar": DATA}) as web:
        yield web


def store_at(web: Web) -> WebStore:
    store = open_store(f"{web.url}/some%20folder/", QUICK)
    assert isinstance(store, WebStore)
    return store


def test_files_are_read(web: Web) -> None:
    store = pickle.loads(pickle.dumps(store_at(web)))
    assert (store.size("é.tar"), store.size("nothing")) == (len(DATA), None)
    assert store.read("é.tar") == DATA
    handle, buffer = store.open("é.tar"), bytearray(1000)
    assert store.preadv(handle, [memoryview(buffer)], 50_001) == 1000
    assert buffer == DATA[50_001:51_001]
    store.close(handle)
    with pytest.raises(FileNotFoundError, match="some%20folder/nothing: no such object"):
        store.open("nothing")
    root = open_store(web.url, QUICK)
    assert root.child("some folder").read("é.tar") == DATA


def test_nothing_is_written(web: Web) -> None:
    store = store_at(web)
    acts: list[Callable[[], object]] = [
        lambda: store.put_if_absent("x", b""), lambda: store.replace("x", b""),
        lambda: store.staged("x").__enter__(), lambda: store.delete("é.tar"),
        lambda: store.move("é.tar", "x"), lambda: store.list(), lambda: store.stale_temporaries(0),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(StoreError, match="a web server is for reading tars only"):
            act()
    assert web.seen == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://", "no server"), ("http://h/a?b=c", "a query"), ("http://h/a#b", "a fragment"),
        ("http://me:secret@h/a", "a user or password"), ("http://h/a//b", "empty parts"),
        ("http://h/%2e%2e/b", "empty parts"), ("http://[h/a", "no url"),
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str, why: str) -> None:
    with pytest.raises(StoreError, match=f"found {why}"):
        open_store(url)


def test_a_file_that_changes_while_it_is_open(web: Web) -> None:
    store = store_at(web)
    handle = store.open("é.tar")
    web.files["/some folder/é.tar"] = DATA[::-1]
    with pytest.raises(StoreError, match="replaced while it was open"):
        handle.fetch(0, 100)


def test_faults_have_names(web: Web) -> None:
    store = store_at(web)
    once = iter(["500", "close", "429"])
    web.fault = lambda method, path, part: next(once, None)
    assert store.size("é.tar") == len(DATA)
    web.fault = lambda method, path, part: "403"
    with pytest.raises(StoreError, match=r"looking up failed.*403.*shows it no password"):
        store.size("é.tar")
    web.fault = lambda method, path, part: "whole"
    handle = store.open("é.tar")
    with pytest.raises(StoreError, match="Range request not supported"):
        handle.fetch(10, 100)


@pytest.mark.parametrize("status", ["400", "403", "405"])
def test_a_server_that_forbids_head(web: Web, status: str) -> None:
    web.fault = lambda method, path, part: status if method == "HEAD" else None
    store = store_at(web)
    assert store.size("é.tar") == len(DATA)
    assert bytes(store.open("é.tar").fetch(7, 9)) == DATA[7:16]


def test_the_token_is_for_the_hub_alone(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert store_at(web).size("é.tar") == len(DATA)
    assert set(web.tokens) == {None}
    with serving() as hub:  # it leads to another server, as the real one does
        hub.moved["/d/resolve/main/é.tar"] = f"{web.url}/some%20folder/%C3%A9.tar"
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        store = open_store(f"{hub.url}/d/resolve/main", QUICK)
        handle = store.open("é.tar")
        assert bytes(handle.fetch(100, 50)) == DATA[100:150]
        assert set(hub.tokens) == {"Bearer hf_secret"}
        assert set(web.tokens) == {None}  # not shown to whom it leads to
    for root, sent in (
        ("https://huggingface.co", True), ("http://huggingface.co", False),
        ("https://huggingface.co.evil.org", False), ("https://evil.org", False),
    ):  # fmt: skip
        assert ("Authorization" in web_headers(root)) == sent
    monkeypatch.delenv("HF_TOKEN")
    assert not re.search("secret", str(web_headers("https://huggingface.co")))
