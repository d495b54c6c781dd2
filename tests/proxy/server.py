"""A proxy on loopback before an object store of the tests, which misbehaves on demand."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

Request = tuple[str, str, str]  # method, path with query, range
FAULTS = ("503", "cut", "stall", "close", "lost")  # those that a repetition of the request mends
COPY_SOURCE = ("x-ms-copy-source", "x-amz-copy-source")
OWN_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
LATE = 5  # seconds that a machine with much else to do may add to a limit
S3_ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"
ANSWERS = {  # what stores say, beyond a bare status
    "expired": (400, S3_ERROR.format("ExpiredToken", "The provided token has expired.")),
    "skewed": (403, S3_ERROR.format("RequestTimeTooSkewed", "The difference between the request "
        "time and the current time is too large.")),
    "unsigned": (403, S3_ERROR.format("AuthenticationFailed", "Server failed to authenticate the "
        "request. Make sure the value of Authorization header is formed correctly.")),
}  # fmt: skip


@dataclass
class Message:
    """A request, or with a `status` the answer to one; names of headers are in small letters."""

    headers: dict[str, str]
    body: bytes = b""
    method: str = ""
    path: str = ""
    status: int = 200

    @property
    def request(self) -> Request:
        return self.method, self.path, self.headers.get("range", "")

    @property
    def name(self) -> str:
        """The object, as the server knows it."""
        return unquote(urlsplit(self.path).path)

    @property
    def query(self) -> dict[str, str]:
        values = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: value[0] for name, value in values.items()}


class Backend(Protocol):
    """What the proxy passes requests on to."""

    def answer(self, request: Message) -> Message: ...


class Port:
    """A real server on a port of this machine; connections are kept, one a thread."""

    def __init__(self, port: int) -> None:
        self.port, self._local = port, threading.local()

    def answer(self, request: Message) -> Message:
        fresh = not hasattr(self._local, "connection")
        if fresh:
            self._local.connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection: http.client.HTTPConnection = self._local.connection
        try:
            connection.putrequest(
                request.method, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                if name not in ("connection", "transfer-encoding"):
                    connection.putheader(name, value)
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Message(headers, answer.read(), status=answer.status)
        except (OSError, http.client.HTTPException):
            connection.close()
            del self._local.connection
            if fresh:
                raise ConnectionError from None
            return self.answer(request)  # it had been idle for too long


@dataclass
class Pending:
    """A copy inside the store that was answered before it is done."""

    request: Message
    size: int
    failed: bool = False


@dataclass
class Fault:
    """What befalls a request, taken apart: `503 after 2` is a 503 that asks to wait for 2 s."""

    kind: str
    after: str = ""

    @classmethod
    def of(cls, text: str | None) -> Fault:
        kind, _, after = (text or "").partition(" after ")
        return cls(kind, after)

    def answer(self) -> Message | None:
        """The answer that takes the place of the store's; None if the store is asked."""
        status, text = ANSWERS.get(self.kind, (int(self.kind) if self.kind.isdigit() else 0, ""))
        if not status:
            return None
        headers = {"content-type": "application/xml"} | (
            {"retry-after": self.after} if self.after else {}
        )
        return Message(headers, text.encode(), status=status)


@dataclass
class Proxy:
    """Passes requests on. `fault` names what befalls a request, or gives None:

    a status, as 503, 429, 403: the answer; `503 after 2`: with `Retry-After: 2`.
    expired, skewed, unsigned: credentials that ran out, clocks that differ, a wrong signature.
    cut: half of the answer comes, then the connection ends.      stall: nothing comes, for ever.
    close: the connection ends before anything is done.           slow: after 0.3 s.
    lost: the request is done, and the connection ends before the answer.
    short: an answer of fewer bytes than were asked for, which says so.
    whole: the range is ignored.        flip: a bit of the body is another.
    changed: the tag is of another version of the object.
    pending: a copy inside the store is answered at once and done when `finish` is called, or after
    it `lasts` that many seconds; it fails if its source is gone then. Meanwhile the new name is as
    `meanwhile` says: absent, empty, or `whole`, of the right size and not to be read.

    Every answer comes `delay` seconds late.
    """

    to: int | Backend
    fault: Callable[[Request, int], str | None] = lambda request, count: None
    delay: float = 0.0
    meanwhile: str = "empty"
    lasts: float | None = None
    drop: str | None = None  # a header that does not get through
    seen: dict[Request, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend: Backend = Port(self.to) if isinstance(self.to, int) else self.to
        self.pending: dict[str, Pending] = {}
        self.sizes: dict[str, int] = {}  # of objects that were looked up
        self.created: set[str] = set()  # names to which no copy on a condition can be pending
        self.copies = 0  # that were pending
        self.first_fault: float | None = None  # when the first request came that a fault befell
        self.open = 0  # requests being answered, and the most that ever were
        self.most = 0
        self._lock, self._over = threading.Lock(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # which keeps connections
            disable_nagle_algorithm = True
            wbufsize = 1 << 16

            def log_message(self, *_: Any) -> None:
                pass

            def handle_request(self) -> None:
                with suppress(ConnectionError, TimeoutError):
                    proxy._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:  # a client that hung up
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def gets(self) -> int:
        """How many reads of bytes came."""
        return sum(n for (method, _, part), n in self.seen.items() if method == "GET" and part)

    def requests(self) -> int:
        return sum(self.seen.values())

    @contextmanager
    def given_up(self, seconds: float) -> Iterator[None]:
        """Requires that what is done meanwhile meets a fault, and is over so many seconds after the
        first request that met one, or LATE more.
        """
        self.first_fault = None
        yield
        assert self.first_fault is not None, "no request met a fault"
        waited = time.monotonic() - self.first_fault
        assert waited < seconds + LATE, f"given up after {waited:.1f} s, not {seconds:g}"

    def finish(self, name: str = "") -> None:
        """Ends the copies that are pending onto names that have `name` in them."""
        for target, copy in list(self.pending.items()):
            if name in target:
                copy.failed = self.backend.answer(copy.request).status >= 300
                if not copy.failed:  # else the new name stays as it is
                    del self.pending[target]

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        message = Message(headers, body, handler.command, handler.path)
        with self._lock:
            request = message.request
            count = self.seen[request] = self.seen.get(request, 0) + 1
            self.open += 1
            self.most = max(self.most, self.open)
        try:
            now, fault = time.monotonic(), self.fault(request, count)
            if fault and self.first_fault is None:
                self.first_fault = now
            self._serve(handler, message, Fault.of(fault))
        finally:
            with self._lock:
                self.open -= 1

    def _serve(self, handler: BaseHTTPRequestHandler, message: Message, fault: Fault) -> None:
        if fault.kind in ("stall", "close"):
            if fault.kind == "stall":
                self._over.wait(60)
            hang_up(handler)
            return
        if pause := self.delay + 0.3 * (fault.kind == "slow"):
            time.sleep(pause)
        if self.drop:
            message.headers.pop(self.drop, None)
        if fault.kind == "whole":
            message.headers.pop("range", None)
        answer = fault.answer() or self._ask(message, fault)
        if fault.kind == "lost":
            hang_up(handler)
            return
        if fault.kind == "changed":
            answer.headers["etag"] = '"another"'
        body, sent = answer.body, len(answer.body)
        if fault.kind == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault.kind == "short":
            sent, body = sent - 1, body[:-1]
        head = message.method == "HEAD"
        length = answer.headers.get("content-length", "0") if head else str(sent)
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, 'Unknown')}"]
        lines += [f"{n}: {value}" for n, value in answer.headers.items() if n not in OWN_HEADERS]
        lines += [f"Content-Length: {length}", "", ""]
        start, body = "\r\n".join(lines).encode("latin-1"), b"" if head else body
        if fault.kind == "cut":
            handler.wfile.write(
                start + body[: len(body) // 2] if body else start[: len(start) // 2]
            )
            hang_up(handler)
        else:
            handler.wfile.write(start)
            handler.wfile.write(body)

    def _ask(self, message: Message, fault: Fault) -> Message:
        """The store's answer, or that of a store whose copies last."""
        name = message.name
        source = next((message.headers[h] for h in COPY_SOURCE if h in message.headers), "")
        if fault.kind == "pending" and source and not {name} & (self.pending.keys() | self.created):
            size = self.sizes.get(unquote(urlsplit(source).path), 0)
            self.pending[name] = Pending(message, size)
            self.copies += 1
            if self.lasts is not None:
                threading.Timer(self.lasts, self.finish, (name,)).start()
            return Message({"x-ms-copy-status": "pending"}, status=202)
        copy = self.pending.get(name)
        if copy is not None and self.meanwhile != "absent" and message.method != "DELETE":
            return self._unfinished(message, copy)
        answer = self.backend.answer(message)
        if message.method == "PUT" and answer.status < 300:
            self.created.add(name)
        if message.method == "HEAD" and answer.status == 200:
            self.sizes[name] = int(answer.headers["content-length"])
        return answer

    def _unfinished(self, message: Message, copy: Pending) -> Message:
        """The answer of the new name to which bytes are still copied."""
        if message.method == "PUT" or (message.method == "GET" and self.meanwhile == "whole"):
            text = S3_ERROR.format("PendingCopyOperation", "There is a pending copy operation.")
            return Message({"content-type": "application/xml"}, text.encode(), status=409)
        if message.headers.get("range") and self.meanwhile == "empty":
            return Message({}, status=416)
        state = "failed" if copy.failed else "pending"
        return Message(
            {
                "etag": f'"{state}"',
                "content-length": str(copy.size if self.meanwhile == "whole" else 0),
                "x-ms-copy-status": state,
                "last-modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            }
        )


class Gate:
    """Holds requests until so many are open at once, which then pass, and all later ones."""

    def __init__(self, proxy: Proxy, count: int) -> None:
        self.proxy, self.count, self.passed = proxy, count, threading.Event()

    def wait(self) -> None:
        if self.proxy.open >= self.count:
            self.passed.set()
        self.passed.wait(20)


class AsksToWait:
    """Answers three requests with a status and `Retry-After: 1`, and all until 0.9 s have passed since."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.refused, self.taken = list[float](), list[float]()  # when requests came

    def __call__(self, request: Request, count: int) -> str | None:
        now = time.monotonic()
        if self.taken or (len(self.refused) > 2 and now - self.refused[2] > 0.9):
            self.taken.append(now)
            return None
        self.refused.append(now)
        return f"{self.status} after 1"

    def check_obeyed(self) -> None:
        """Asserts that nothing came in vain but the request, the same again, and one that asks how long to
        wait, and that the next came only then.
        """
        assert len(self.refused) == 3
        assert self.taken[0] - self.refused[2] > 0.9


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    with suppress(OSError):
        handler.wfile.flush()
    handler.close_connection = True


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
