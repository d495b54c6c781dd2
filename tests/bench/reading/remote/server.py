"""A folder as a read-only object store on loopback: nginx for the bytes where it is installed, as fast
as it can or with a limit for each connection, a listing of Python's, and a proxy that is late.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.servers.ports import free_port

BUCKET, PIPE = "bench", 1 << 20
CONFIG = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.err; worker_processes 2; {user}
events {{ worker_connections 512; }}
http {{
  client_body_temp_path {folder}/nginx; proxy_temp_path {folder}/nginx; fastcgi_temp_path {folder}/nginx;
  uwsgi_temp_path {folder}/nginx; scgi_temp_path {folder}/nginx;
  log_format counted '$request_method $body_bytes_sent'; access_log {folder}/access.log counted;
  sendfile on; tcp_nopush on; keepalive_requests 1000000;
  server {{
    listen 127.0.0.1:{port} backlog=512; root {folder}/bucket;
    location / {{ if ($args ~ "list-type") {{ proxy_pass http://127.0.0.1:{listing}; }} }}
  }}
  server {{
    listen 127.0.0.1:{limited} backlog=512; root {folder}/bucket;
    limit_rate {rate}; sendfile_max_chunk 512k;
    location / {{ if ($args ~ "list-type") {{ proxy_pass http://127.0.0.1:{listing}; }} }}
  }}
}}
"""
RATE = 75_000_000  # bytes a second of a connection: 1.2 GB of 16, as a network of 10 Gbit/s has


class Handler(BaseHTTPRequestHandler):
    """Listings of a folder, and its files by range."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    log: list[int]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = self.folder / unquote(url.path).strip("/")
        if "list-type" in url.query:
            self.answer(200, listing(self.folder / BUCKET, parse_qs(url.query)).encode())
        elif not path.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            size, status, start, end = path.stat().st_size, 200, 0, path.stat().st_size
            headers = {"ETag": f'"{size}"', "Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}
            if part := self.headers.get("Range"):
                first, _, last = part.removeprefix("bytes=").partition("-")
                status, start, end = 206, int(first), min(int(last or size) + 1, size)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            with path.open("rb") as file:
                file.seek(start)
                self.answer(status, file.read(end - start), headers)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0 if self.command == "HEAD" else self.wfile.write(body)
        self.log.append(sent)


def listing(folder: Path, query: dict[str, list[str]]) -> str:
    """Returns S3's answer to a request for a list of all objects below a prefix."""
    prefix = query.get("prefix", [""])[0]
    below = folder / prefix.rpartition("/")[0]  # of columns of many objects all would take a minute
    names = sorted(p.relative_to(folder).as_posix() for p in below.rglob("*") if p.is_file())
    items = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{(folder / name).stat().st_size}</Size>"
        "<LastModified>2000-01-01T00:00:00.000Z</LastModified></Contents>"
        for name in names
        if name.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"


class Store:
    """The folder `bucket` below a folder, served at `port` until the block ends, and at `limited` with
    RATE for each connection; None without nginx.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder, list[int]()
        self._sent = 0  # answers of the log, or bytes of nginx's, that were counted
        handler = type("Handler", (Handler,), {"folder": folder / "bucket", "log": self._log})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port, self.name = self._server.server_port, "Python's http.server"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._nginx: subprocess.Popen[bytes] | None = None
        self.limited: int | None = None
        if nginx := shutil.which("nginx"):
            self.name, listing_port = "nginx", self.port
            self.port, self.limited = free_port(), free_port()
            root = Path("/proc/self").stat().st_uid == 0
            config = folder / "nginx.conf"
            config.write_text(
                CONFIG.format(
                    folder=folder,
                    port=self.port,
                    limited=self.limited,
                    rate=RATE,
                    listing=listing_port,
                    user="user root;" * root,
                )  # fmt: skip
            )
            (folder / "nginx").mkdir()
            self._nginx = subprocess.Popen([nginx, "-c", str(config), "-e", f"{folder}/nginx.err"])

    def __enter__(self) -> Store:
        for _ in range(500):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} does not answer: see {self.folder}/nginx.err")

    def count(self) -> tuple[int, int]:
        """Returns (requests, bytes of bodies) that were answered since this was asked last."""
        if self._nginx is None:
            new = self._log[self._sent :]
            self._sent += len(new)
            return len(new), sum(new)
        time.sleep(0.05)  # a line is written after its answer
        with (self.folder / "access.log").open("rb") as log:
            log.seek(self._sent)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._sent += len(whole + newline)
        new = [int(line.split()[1]) for line in whole.splitlines()]
        return len(new), sum(new)

    def __exit__(self, *_: object) -> None:
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait(20)
        self._server.shutdown()
        self._server.server_close()


class Delayed:
    """Passes connections on to a port; every request comes late, and answers as they come."""

    def __init__(self, to: int, seconds: float) -> None:
        self._to, self._seconds = to, seconds
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=pass_answers, args=(server, client), daemon=True)
            answers.start()
            with suppress(OSError):
                while part := client.recv(1 << 16):
                    time.sleep(self._seconds)
                    server.sendall(part)
            shut_down(client, server)
            answers.join()

    def __enter__(self) -> Delayed:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def pass_answers(server: socket.socket, client: socket.socket) -> None:
    """Passes on what a server sends through a pipe: its bytes stay in the kernel and are not copied."""
    out, into = os.pipe()
    with suppress(OSError):
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE)
        while count := os.splice(server.fileno(), into, PIPE):
            while count:
                count -= os.splice(out, client.fileno(), count)
    os.close(out)
    os.close(into)
    shut_down(client, server)


def shut_down(*ends: socket.socket) -> None:
    """Ends connections for all who read from them or write to them."""
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
