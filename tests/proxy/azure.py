"""The blobs of one Azure account, in memory: as much of the protocol as the client uses."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest

from .server import Message

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONTAINER = "shelf"


def point_to_azure(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Leads the environment's Azure to a port of loopback."""
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,  # the published one of every emulator
        "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        "AZURE_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)


@dataclass
class Blob:
    data: bytes
    changed: float = field(default_factory=time.time)

    @property
    def headers(self) -> dict[str, str]:
        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(self.changed))
        tag = hashlib.sha256(self.data + repr(self.changed).encode()).hexdigest()[:16]
        return {"etag": f'"{tag}"', "last-modified": when, "x-ms-blob-type": "BlockBlob"}


class Azure:
    """Containers and their blobs; a request is answered after the one before it."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, Blob]] = {CONTAINER: {}}
        self._blocks: dict[tuple[str, str], dict[str, bytes]] = {}  # sent, and of no blob yet
        self._lock = threading.Lock()

    def answer(self, request: Message) -> Message:
        with self._lock:
            _, account, container, *parts = (*request.name.split("/", 3), "")[:4]
            assert account == ACCOUNT
            if container not in self.containers:
                return fault(404, "ContainerNotFound", "The specified container does not exist.")
            name = "/".join(parts)
            if request.query.get("comp") == "list":
                return self._list(container, request.query)
            if request.query.get("comp") == "batch":
                return self._batch(container, request)
            return getattr(self, f"_{request.method.lower()}")(container, name, request)  # type: ignore[no-any-return]

    def _put(self, container: str, name: str, request: Message) -> Message:
        blobs, blocks = self.containers[container], self._blocks.setdefault((container, name), {})
        if request.query.get("comp") == "block":
            blocks[request.query["blockid"]] = request.body
            return Message({}, status=201)
        if name in blobs and request.headers.get("if-none-match") == "*":
            return fault(409, "BlobAlreadyExists", "The specified blob already exists.")
        if request.query.get("comp") == "blocklist":
            ids = [item.text or "" for item in ElementTree.fromstring(request.body)]
            blobs[name] = Blob(b"".join(blocks[i] for i in ids))
            return Message(blobs[name].headers, status=201)
        source = request.headers.get("x-ms-copy-source")
        if source is None:
            blobs[name] = Blob(request.body)
            return Message(blobs[name].headers, status=201)
        blob = blobs.get(unquote(urlsplit(source).path).split("/", 3)[3])
        if blob is None:
            return fault(404, "BlobNotFound", "The specified blob does not exist.")
        blobs[name] = Blob(blob.data)
        return Message(blobs[name].headers | {"x-ms-copy-status": "success"}, status=202)

    def _get(self, container: str, name: str, request: Message) -> Message:
        blob = self.containers[container].get(name)
        if blob is None:
            return fault(404, "BlobNotFound", "The specified blob does not exist.")
        if request.headers.get("if-match", blob.headers["etag"]) != blob.headers["etag"]:
            return fault(412, "ConditionNotMet", "The condition is not met.")
        size, part = len(blob.data), request.headers.get("range")
        if part is None:
            return Message(blob.headers, blob.data)
        first, _, last = part.removeprefix("bytes=").partition("-")
        start, end = (int(first), int(last or size - 1)) if first else (size - int(last), size - 1)
        if start >= size:
            return fault(416, "InvalidRange", "The range is not satisfiable.")
        end = min(end, size - 1)
        headers = blob.headers | {"content-range": f"bytes {start}-{end}/{size}"}
        return Message(headers, blob.data[start : end + 1], status=206)

    def _head(self, container: str, name: str, request: Message) -> Message:
        answer = self._get(container, name, request)
        length = {"content-length": str(len(answer.body))}
        return Message(answer.headers | length, status=answer.status)

    def _delete(self, container: str, name: str, request: Message) -> Message:
        if self.containers[container].pop(name, None) is None:
            return fault(404, "BlobNotFound", "The specified blob does not exist.")
        return Message({}, status=202)

    def _batch(self, container: str, request: Message) -> Message:
        """Deletes several blobs, which is how the client deletes a single one, too."""
        parts = []
        for number, line in enumerate(re.findall(rb"DELETE (\S+) HTTP", request.body)):
            name = Message({}, path=line.decode()).name.split("/", 3)[3]
            status = self._delete(container, name, request).status
            parts.append(
                "--batch\r\nContent-Type: application/http\r\n"
                f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status} Done\r\n\r\n\r\n"
            )
        headers = {"content-type": "multipart/mixed; boundary=batch"}
        return Message(headers, "".join([*parts, "--batch--\r\n"]).encode(), status=202)

    def _list(self, container: str, query: dict[str, str]) -> Message:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = sorted(n for n in self.containers[container] if n.startswith(prefix))
        folders: set[str] = set()
        if delimiter:
            deeper = {n for n in names if delimiter in n[len(prefix) :]}
            folders = {prefix + n[len(prefix) :].partition(delimiter)[0] + "/" for n in deeper}
            names = [n for n in names if n not in deeper]
        start = int(query.get("marker") or 0)
        most = min(int(query.get("maxresults") or 5000), 5000)
        following = str(start + most) if start + most < len(names) else ""
        items = "".join(self._item(container, n) for n in names[start : start + most])
        items += "".join(
            f"<BlobPrefix><Name>{escape(n)}</Name></BlobPrefix>" for n in sorted(folders)
        )
        text = (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults>'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{items}</Blobs>"
            f"<NextMarker>{following}</NextMarker></EnumerationResults>"
        )
        return Message({"content-type": "application/xml"}, text.encode())

    def _item(self, container: str, name: str) -> str:
        blob = self.containers[container][name]
        digest = base64.b64encode(hashlib.md5(blob.data).digest()).decode()
        return (
            f"<Blob><Name>{escape(name)}</Name><Properties>"
            f"<Last-Modified>{blob.headers['last-modified']}</Last-Modified>"
            f"<Etag>{escape(blob.headers['etag'])}</Etag>"
            f"<Content-Length>{len(blob.data)}</Content-Length><Content-MD5>{digest}</Content-MD5>"
            "<Content-Type>application/octet-stream</Content-Type>"
            "<BlobType>BlockBlob</BlobType></Properties></Blob>"
        )


def fault(status: int, code: str, message: str) -> Message:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    headers = {"content-type": "application/xml", "x-ms-error-code": code}
    return Message(headers, text.encode(), status=status)
