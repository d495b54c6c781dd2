"""A real web server on loopback: files in memory, ranges, and faults on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Web:
    """Serves `files` by path. `fault` names what befalls a request, or gives None:

    a number: that status is the answer.      cut: half of the body comes, then the connection ends.
    stall: nothing comes, for ever.           few: half of the range comes, and the answer says so.
    whole: the range is ignored.              close: the connection ends before the answer.
    pause: half of the body comes, then nothing until the server closes.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[str, str, str], str | None] = lambda method, path, part: None
        self.moved: dict[str, str] = {}  # path -> url that it leads to
        self.seen: list[tuple[str, str, str]] = []  # method, path, range
        self.tokens: list[str | None] = []  # the Authorization of each
        self.over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            web = self

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    self.web.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def gets(self, path: str = "") -> int:
        return sum(method == "GET" and path in at for method, at, _ in self.seen)

    def headers(self, path: str, data: bytes) -> dict[str, str]:
        return {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, part = unquote(urlsplit(request.path).path), request.headers.get("Range", "")
        self.seen.append((request.command, path, part))
        self.tokens.append(request.headers.get("Authorization"))
        fault = self.fault(request.command, path, part)
        if path in self.moved:
            return self.send(request, 302, {"Location": self.moved[path]}, b"")
        if fault and fault.isdigit():
            return self.send(request, int(fault), {}, b"")
        if fault in ("stall", "close"):
            if fault == "stall":
                self.over.wait(60)
            request.close_connection = True
            return None
        if path not in self.files:
            return self.send(request, 404, {}, b"")
        data = self.files[path]
        headers, status, body = self.headers(path, data), 200, data
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", part)
        if asked and fault != "whole":
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first > last:
                return self.send(request, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            if fault == "few":
                last = (first + last) // 2
            body, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self.send(request, status, headers, body, fault)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes,
        fault: str | None = None,
    ) -> None:  # fmt: skip
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if fault in ("cut", "pause") else body)
        if fault == "pause":
            self.over.wait(60)
        if fault in ("cut", "pause"):
            request.close_connection = True

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(**files: bytes) -> Iterator[Web]:
    web = Web()
    web.files.update({f"/{name}": data for name, data in files.items()})
    try:
        yield web
    finally:
        web.close()
