"""Google's storage: columns are written there and read, and a server that asks to wait is left alone,
whatever shows it who asks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from shards import Column
from shards.errors import StoreError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.store.throttle import asked_wait
from shards.tools.copy import copy
from tests.proxy.google import GOOGLE_BUCKET, Google, Stored, point_to_google
from tests.proxy.server import AsksToWait, Message, Proxy
from tests.servers.every_tool import use_every_tool
from tests.shards.toy import moments_spec, row_ids, write_column

ROOT = f"gs://{GOOGLE_BUCKET}"
QUICK = Limits(30, stall=60, request=60, copy=60, give_up=60, backoff=0.01, max_backoff=0.1)
PART = 1 << 12
TOKEN, EMAIL, NAME = "a-token", "writer@project.example", "a folder/x"


@pytest.fixture
def google() -> Google:
    return Google()


@pytest.fixture
def proxy(google: Google, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """Leads the environment to a proxy before the buckets."""
    proxy = Proxy(google)
    for name in ("SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BEARER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "pages"))
    point_to_google(monkeypatch, proxy.port)
    yield proxy
    proxy.close()


# Columns --------------------------------------------------------------------------------------------


def put_large(store: RemoteStore, data: bytes) -> bool:
    with store.staged("values/0") as file:
        file.write(data)
        return file.publish()


def test_every_tool(
    proxy: Proxy, google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.upload.PART", PART)  # objects of toys are copied in the store
    use_every_tool(ROOT, tmp_path)
    assert google.parts == {}
    assert any("uploadId" in path for _, path, _ in proxy.seen)


def test_rows_are_read(proxy: Proxy, tmp_path: Path) -> None:
    near = write_column(tmp_path / "near", moments_spec())
    copy(near, f"{ROOT}/column")
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    far = Column.open(f"{ROOT}/column")
    np.testing.assert_array_equal(far.read(ids), Column.open(near).read(ids))
    far.close()


def test_of_two_writers_one_creates(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.store.upload.PART", PART)
    for size in (10, 5 * PART + 7):  # created in one request; copied to its name
        data = [bytes([i]) * size for i in range(4)]
        store = RemoteStore(f"{ROOT}/raced-{size}", QUICK)
        with ThreadPoolExecutor(4) as pool:
            created = list(pool.map(lambda each, store=store: put_large(store, each), data))
        assert sorted(created) == [False, False, False, True]
        assert store.read("values/0") == data[created.index(True)]
        assert store.stale_temporaries(0) == []


@pytest.mark.parametrize("large", [False, True])
def test_a_server_without_conditions_is_refused(
    proxy: Proxy, google: Google, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.upload.PART", PART)
    google.conditions = False
    with pytest.raises(StoreError, match=rf"{ROOT}: this store replaces what exists"):
        put_large(RemoteStore(f"{ROOT}/column", QUICK), bytes(2 * PART if large else 9))


# Waiting --------------------------------------------------------------------------------------------


class Machine:
    """Gives its token to whoever asks as Google's machines are asked."""

    def answer(self, request: Message) -> Message:
        assert request.headers["metadata-flavor"] == "Google"
        assert request.name == "/computeMetadata/v1/instance/service-accounts/default/token"
        answer = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
        return Message({"content-type": "application/json"}, json.dumps(answer).encode())


def signed_by(key: rsa.RSAPublicKey, request: Message) -> bool:
    """Says whether a url has a right signature (V4, cloud.google.com/storage/docs/authentication/signatures)."""
    url = urlsplit(request.path)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    signature = bytes.fromhex(query.pop("X-Goog-Signature", ""))
    if not signature:
        return False
    words = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in sorted(query.items()))
    canonical = f"{request.method}\n{url.path}\n{words}\nhost:storage.googleapis.com\n\nhost\nUNSIGNED-PAYLOAD"
    account, _, scope = query["X-Goog-Credential"].partition("/")
    assert account == EMAIL
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"GOOG4-RSA-SHA256\n{query['X-Goog-Date']}\n{scope}\n{digest}"
    try:
        key.verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return int(query["X-Goog-Expires"]) <= 300


@pytest.fixture(params=["none", "emulator", "token", "machine", "key", "key file", "default file"])
def credentials(
    request: pytest.FixtureRequest, google: Google, proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> Iterator[str]:  # fmt: skip
    """What shows the buckets who asks, of each kind; there is an object `x`."""
    google.buckets[GOOGLE_BUCKET][NAME] = Stored(b"data", 1)
    kind = request.param
    if kind == "emulator":
        yield kind
        return
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{proxy.port}")
    machine = Proxy(Machine())
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{machine.port}")
    google.admits = lambda request: request.headers.get("authorization") == f"Bearer {TOKEN}"
    if kind == "none":
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        google.admits = lambda request: "authorization" not in request.headers
    elif kind == "token":
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
    elif kind != "machine":
        key = rsa.generate_private_key(65537, 2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()  # fmt: skip
        account = {"type": "service_account", "private_key": pem, "private_key_id": "1"}
        account["client_email"] = EMAIL
        path = tmp_path / "key.json"
        if kind == "default file":
            path = tmp_path / "home/.config/gcloud/application_default_credentials.json"
            path.parent.mkdir(parents=True)
        path.write_text(json.dumps(account))
        if kind == "key":
            monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        elif kind == "key file":
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        google.admits = lambda request: (
            re.match(r"Bearer ey\w+\.ey", request.headers.get("authorization", "")) is not None
            or signed_by(key.public_key(), request)
        )
    yield kind
    machine.close()


def test_a_server_is_left_alone_for_as_long_as_it_asks(
    credentials: str, proxy: Proxy, google: Google
) -> None:
    proxy.fault = asking = AsksToWait("429")
    assert RemoteStore(f"{ROOT}/a folder", QUICK).read("x") == b"data"
    asking.check_obeyed()
    # the one that asks is admitted, too, once the server takes requests again
    known: list[bool] = []
    admits = google.admits
    google.admits = lambda request: known.append(admits(request)) or known[-1]  # type: ignore[func-returns-value]
    RemoteStore(ROOT, QUICK).call(
        "asking", NAME,
        lambda library, store: asked_wait(f"{ROOT}/{NAME}", ROOT, library, store, {}, 5),
    )  # fmt: skip
    assert known == [True]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GOOGLE_SERVICE_ACCOUNT_KEY", '{"type": "authorized_user", "refresh_token": "t"}'),
        ("GOOGLE_SERVICE_ACCOUNT_KEY", "no JSON"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file"),
        ("GCE_METADATA_HOST", "127.0.0.1:1"),  # where nothing answers
    ],
)
def test_who_cannot_ask_does_not(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{proxy.port}")
    monkeypatch.setenv(variable, text)
    assert asked_wait(f"{ROOT}/x", ROOT, None, None, {}, 5) is None
    assert proxy.seen == {}
