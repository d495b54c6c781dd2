"""The buckets of Google's storage, in memory: as much of its XML protocol as the client uses."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest

from .server import Message

GOOGLE_BUCKET = "shelf"


def point_to_google(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Leads the environment's Google to a port of loopback, where nobody asks for credentials."""
    key = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
    key |= {"client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")


@dataclass
class Stored:
    data: bytes
    generation: int
    changed: float = field(default_factory=time.time)

    @property
    def headers(self) -> dict[str, str]:
        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(self.changed))
        tag = f'"{hashlib.md5(self.data).hexdigest()}{self.generation}"'
        return {"etag": tag, "last-modified": when, "x-goog-generation": str(self.generation)}


@dataclass
class Google:
    """Buckets and their objects; a request is answered after the one before it.

    `admits` says whether a request shows who asks; without `conditions` it creates over what exists.
    """

    admits: Callable[[Message], bool] = lambda request: True
    conditions: bool = True

    def __post_init__(self) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {GOOGLE_BUCKET: {}}
        self.parts: dict[str, dict[int, bytes]] = {}  # of uploads that have not ended
        self._generations, self._lock = itertools.count(1), threading.Lock()

    def answer(self, request: Message) -> Message:
        with self._lock:
            if not self.admits(request):
                return fault(401, "AuthenticationRequired", "Authentication required.")
            _, bucket, *rest = request.name.split("/", 2)
            if bucket not in self.buckets:
                return fault(404, "NoSuchBucket", "The specified bucket does not exist.")
            name = "/".join(rest)
            if request.query.get("list-type") == "2":
                return self._list(bucket, request.query)
            if {"uploads", "uploadId"} & request.query.keys():
                return self._upload(bucket, name, request)
            return getattr(self, f"_{request.method.lower()}")(bucket, name, request)  # type: ignore[no-any-return]

    def _keep(self, bucket: str, name: str, data: bytes, text: str = "") -> Message:
        stored = self.buckets[bucket][name] = Stored(data, next(self._generations))
        return Message(stored.headers, text.format(etag=escape(stored.headers["etag"])).encode())

    def _put(self, bucket: str, name: str, request: Message) -> Message:
        objects, source = self.buckets[bucket], request.headers.get("x-goog-copy-source")
        if (
            self.conditions
            and name in objects
            and request.headers.get("x-goog-if-generation-match") == "0"
        ):
            return fault(412, "PreconditionFailed", "The object exists.")
        if source is None:
            return self._keep(bucket, name, request.body)
        shelf, _, key = unquote(source).partition("/")
        if key not in self.buckets[shelf]:
            return fault(404, "NoSuchKey", "The specified key does not exist.")
        return self._keep(bucket, name, self.buckets[shelf][key].data, COPIED)

    def _get(self, bucket: str, name: str, request: Message) -> Message:
        stored = self.buckets[bucket].get(name)
        if stored is None:
            return fault(404, "NoSuchKey", "The specified key does not exist.")
        if request.headers.get("if-match", stored.headers["etag"]) != stored.headers["etag"]:
            return fault(412, "PreconditionFailed", "The object is another.")
        size, part = len(stored.data), request.headers.get("range")
        if part is None:
            return Message(stored.headers, stored.data)
        first, _, last = part.removeprefix("bytes=").partition("-")
        start, end = (int(first), int(last or size - 1)) if first else (size - int(last), size - 1)
        if start >= size:
            return fault(416, "InvalidRange", "The range is not satisfiable.")
        end = min(end, size - 1)
        headers = stored.headers | {"content-range": f"bytes {start}-{end}/{size}"}
        return Message(headers, stored.data[start : end + 1], status=206)

    def _head(self, bucket: str, name: str, request: Message) -> Message:
        answer = self._get(bucket, name, request)
        length = {"content-length": str(len(answer.body))}
        return Message(answer.headers | length, status=answer.status)

    def _delete(self, bucket: str, name: str, request: Message) -> Message:
        if self.buckets[bucket].pop(name, None) is None:
            return fault(404, "NoSuchKey", "The specified key does not exist.")
        return Message({}, status=204)

    def _upload(self, bucket: str, name: str, request: Message) -> Message:
        """An upload in parts is begun, gets a part, is ended, or becomes an object."""
        if "uploads" in request.query:
            number = str(next(self._generations))
            self.parts[number] = {}
            return Message({}, BEGUN.format(number=number).encode())
        number = request.query["uploadId"]
        if number not in self.parts:
            return fault(404, "NoSuchUpload", "The upload does not exist.")
        if request.method == "PUT":
            self.parts[number][int(request.query["partNumber"])] = request.body
            return Message({"etag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        parts = self.parts.pop(number)
        if request.method == "DELETE":
            return Message({}, status=204)
        numbers = [
            int(part.text or 0)
            for part in ElementTree.fromstring(request.body).iter()
            if part.tag.endswith("PartNumber")
        ]
        return self._keep(bucket, name, b"".join(parts[n] for n in numbers), COMPLETED)

    def _list(self, bucket: str, query: dict[str, str]) -> Message:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = sorted(n for n in self.buckets[bucket] if n.startswith(prefix))
        folders: set[str] = set()
        if delimiter:
            deeper = {n for n in names if delimiter in n[len(prefix) :]}
            folders = {prefix + n[len(prefix) :].partition(delimiter)[0] + "/" for n in deeper}
            names = [n for n in names if n not in deeper]
        start = int(query.get("continuation-token") or 0)
        most = min(int(query.get("max-keys") or 1000), 1000)
        shown = names[start : start + most]
        items = "".join(item(n, self.buckets[bucket][n]) for n in shown)
        items += "".join(
            f"<CommonPrefixes><Prefix>{escape(n)}</Prefix></CommonPrefixes>"
            for n in sorted(folders)
        )
        if start + most < len(names):
            items += f"<NextContinuationToken>{start + most}</NextContinuationToken>"
        return Message({}, f"<ListBucketResult>{items}</ListBucketResult>".encode())


BEGUN = (
    "<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
)
COMPLETED = "<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
COPIED = "<CopyObjectResult><ETag>{etag}</ETag></CopyObjectResult>"


def item(name: str, stored: Stored) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.changed))
    return (
        f"<Contents><Key>{escape(name)}</Key><Size>{len(stored.data)}</Size>"
        f"<LastModified>{when}</LastModified><ETag>{escape(stored.headers['etag'])}</ETag></Contents>"
    )


def fault(status: int, code: str, message: str) -> Message:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Message({"content-type": "application/xml"}, text.encode(), status=status)
