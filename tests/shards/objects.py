"""A real S3 protocol server on loopback, and a proxy before it that misbehaves."""

from __future__ import annotations

import io
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

BUCKET = "shelf"


class OneByOne:
    """A WSGI application whose requests are answered one after the other, once their bodies are in.

    moto looks whether a name is taken and takes it in two steps; real stores do it in one.
    """

    def __init__(self, application: Any) -> None:
        self.application, self.lock = application, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self.lock:
            return list(self.application(environ, start))


class Server:
    """moto on a free port of loopback, with one bucket."""

    def __init__(self) -> None:
        from moto.backends import get_backend
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"  # which keeps connections

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        application = OneByOne(DomainDispatcherApplication(create_backend_app))
        self._server = make_server(
            "127.0.0.1", 0, application, threaded=True, request_handler=Handler
        )
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.backend = get_backend("s3")["123456789012"]["aws"]
        if BUCKET not in self.backend.buckets:  # of another server of this process
            self.backend.create_bucket(BUCKET, "us-east-1")

    def unfinished(self) -> int:
        """Uploads in parts that were neither completed nor ended."""
        return len(self.backend.buckets[BUCKET].multiparts)

    def take(self, folder: Path, url: str) -> None:
        """Holds the files of a folder as objects below a url, without a request for each."""
        prefix = url.removeprefix(f"s3://{BUCKET}/")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            self.backend.put_object(BUCKET, f"{prefix}/{name}", path.read_bytes())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Lead the environment's S3 to a port of loopback."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real S3 protocol server on loopback; one a process, since its buckets are global."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def url(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> str:
    """A prefix of this test's own; the environment leads to the server and to an empty cache."""
    point_to(monkeypatch, server.port)
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


Request = tuple[str, str, str]  # method, path with query, range
ANSWERS = {"503": b"503 Slow Down", "403": b"403 Forbidden"}
FAULTS = ("503", "cut", "stall", "close", "lost")


class Proxy:
    """Passes requests on, one a connection. `fault` names what befalls a request, or gives None:

    503, 403: that is the answer.            cut: half of the answer comes, then the connection ends.
    stall: nothing comes, for ever.          close: the connection ends before anything is done.
    short: an answer of fewer bytes than were asked for, which says so.
    lost: the request is done, and the connection ends before the answer.      slow: after 0.3 s.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[Request, int], str | None] = lambda request, count: None
        self.seen: dict[Request, int] = {}
        self.drop: bytes | None = None  # a header that does not get through
        self._to, self._over = port, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def gets(self) -> int:
        """How many reads of bytes came."""
        return sum(n for (method, _, part), n in self.seen.items() if method == "GET" and part)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError, ValueError, TimeoutError):
            file = connection.makefile("rb")
            head = b"".join(iter(file.readline, b"\r\n"))
            fields = dict(line.lower().split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
            body = file.read(int(fields.get(b"content-length", 0)))
            method, path, _ = head.partition(b"\r\n")[0].decode().split(" ")
            request = (method, path, fields.get(b"range", b"").decode())
            self.seen[request] = self.seen.get(request, 0) + 1
            fault = self.fault(request, self.seen[request])
            if fault in ANSWERS:
                connection.sendall(
                    b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                    % ANSWERS[fault]
                )
            elif fault == "stall":
                self._over.wait(60)
            elif fault != "close":
                if fault == "slow":
                    time.sleep(0.3)
                if self.drop:
                    lines = head.split(b"\r\n")
                    head = b"\r\n".join(x for x in lines if not x.lower().startswith(self.drop))
                with socket.create_connection(("127.0.0.1", self._to)) as server:
                    server.sendall(head + b"Connection: close\r\n\r\n" + body)
                    answer = server.makefile("rb").read()
                if fault == "short":
                    length = int(re.search(rb"Content-Length: (\d+)", answer)[1])  # type: ignore[index]
                    header = b"Content-Length: %d" % (length - 1)
                    answer = re.sub(rb"Content-Length: \d+", header, answer)[:-1]
                if fault != "lost":
                    connection.sendall(answer[: len(answer) // 2] if fault == "cut" else answer)

    def close(self) -> None:
        self._over.set()
        self._listener.close()


class EachKindOnce:
    """The first request of every kind fails: of a method, with parameters, for a range, for a
    temporary object or a final one.
    """

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.kinds: set[str] = set()

    def __call__(self, request: Request, count: int) -> str | None:
        method, path, part = request
        url = urlsplit(path)
        words = [method, *sorted(parse_qs(url.query, keep_blank_values=True))]
        words += ["range"] * bool(part) + ["temporary"] * ("/.tmp-" in url.path)
        new = " ".join(words) not in self.kinds
        self.kinds.add(" ".join(words))
        return self.fault if new else None
