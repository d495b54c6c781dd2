"""A real S3 protocol server on loopback; tests/proxy has one that misbehaves."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
