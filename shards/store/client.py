"""Requests to an object store by obstore: configured from the environment, repeated while that can
help, ended in time, with errors that have names.

obstore's threads do not survive a fork: a child that used the library it inherited would wait for
ever, and so would its parent, whose event queue it shares. A child therefore loads the library
again, from a copy of its file, and so gets threads of its own.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import ShardsError, StoreError
from ..printing import redacted
from ..signals import asking
from .throttle import THROTTLED, asked_wait

T = TypeVar("T")
PREFIX = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE", "http": "HTTP", "https": "HTTPS"}
# obstore reads the rest of the environment itself, but not these once it is given time limits
CLIENT_OPTIONS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes")
ADVICE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the role of this machine; "
    "AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "http": "what the server asks for: this program shows it no password",
    "https": "HF_TOKEN, if it is huggingface.co; other servers are shown no password",
}
NETWORK = {
    "s3": "AWS_ENDPOINT_URL, AWS_REGION, and AWS_ALLOW_HTTP=true if the address is http://",
    "gs": "the network",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and the network",
    "http": "the url and the network",
    "https": "the url and the network",
}
SLICE = 0.2  # seconds after which a pause looks whether the program ends
# what the library raises of values that it takes for checked; it is no Exception
PANIC = "PanicException"
CREATE = ("creating", "copying")  # work to which 409 says that an object exists
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|specified bucket does not exist")
EXPIRED = re.compile("ExpiredToken|TokenExpired|[Tt]oken (has|is) expired|specified time frame")
SKEWED = re.compile("RequestTimeTooSkewed|RequestExpired|[Dd]ate header too old|able timeframe")


@dataclass(frozen=True)
class Limits:
    """Where waiting ends, in seconds."""

    connect: float = 5
    stall: float = 30  # no byte comes
    request: float = 120  # one request, of 8 MiB at most
    copy: float = 1200  # one copy inside the store, of 5 GiB at most
    give_up: float = 240  # all repetitions of a request together
    backoff: float = 0.1  # before the first repetition, then more and more
    max_backoff: float = 15


def web_headers(root: str) -> dict[str, str]:
    """Returns the headers for a web server; the token in HF_TOKEN is for huggingface.co, or HF_ENDPOINT
    in its place, alone. A server that these redirect to does not see it.
    """
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are of the file as it is
    hosts = {"https://huggingface.co", "https://hf.co", os.environ.get("HF_ENDPOINT", "")}
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and root in {host.rstrip("/").lower() for host in hosts}:
        headers["Authorization"] = f"Bearer {token}"
    return headers


class NoRanges(StoreError):
    """A web server gives whole files only."""


class TruncatedBody(OSError):
    """A body of fewer bytes than were promised."""


class ForkGuard:
    """What of the library belongs to this process."""

    lock = threading.Lock()
    library: Any = None
    folder: Any = None  # where the library was found
    inherited = False
    # never freed after a fork: destructors may wait for threads that are gone
    leaked: list[Any] = []

    @classmethod
    def forked(cls) -> None:
        cls.lock = threading.Lock()
        if cls.library is not None:
            cls.leaked.append(cls.library)
            cls.library, cls.inherited = None, True


def library() -> Any:
    """Returns obstore, with threads of this process."""
    if ForkGuard.library is None:
        with ForkGuard.lock:
            if ForkGuard.inherited:
                ForkGuard.library = _loaded_again()
            elif ForkGuard.library is None:
                os.register_at_fork(after_in_child=ForkGuard.forked)
                ForkGuard.library = importlib.import_module("obstore")
                ForkGuard.folder = ForkGuard.library.__path__
            ForkGuard.inherited = False
    return ForkGuard.library


def _loaded_again() -> Any:
    """Loads obstore from a copy of its shared object, which the loader takes for another library."""
    name = "obstore._obstore"
    spec = importlib.machinery.PathFinder.find_spec(name, ForkGuard.folder)
    assert spec is not None
    assert spec.origin is not None
    for module_name in [m for m in sys.modules if m == "obstore" or m.startswith("obstore.")]:
        ForkGuard.leaked.append(sys.modules.pop(module_name))
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        shutil.copyfile(spec.origin, file.name)
        loader = importlib.machinery.ExtensionFileLoader(name, file.name)
        copy = importlib.util.spec_from_loader(name, loader)
        assert copy is not None
        try:
            module = importlib.util.module_from_spec(copy)
        except ImportError as error:
            raise StoreError(
                f"{file.name}: obstore cannot be loaded again after a fork ({error}). Set TMPDIR to "
                "a folder from which programs may run, or start processes by `spawn`"
            ) from None
        sys.modules[name] = module
        loader.exec_module(module)
    return importlib.import_module("obstore")


class Client:
    """One bucket or container. Pickles; every process makes its own connections."""

    def __init__(self, root: str, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self.scheme = root.partition("://")[0]
        self.conditions: set[str] = set()  # those that the store was seen to respect
        self._stores: dict[tuple[int, str], Any] = {}
        self._asks_to_wait = True  # as far as is known

    def __reduce__(self) -> tuple[Any, ...]:
        return Client, (self.root, self.limits)

    def _store(self, kind: str) -> Any:
        """Returns obstore's store of this process for requests that "read", "list", "upload" or "copy"."""
        key = (os.getpid(), kind)
        if key not in self._stores:
            errors = library().exceptions.BaseError, OSError, ValueError
            try:
                self._stores[key] = self._connect(kind)
            except errors as error:  # no request was made
                raise self._unusable(error) from None
        return self._stores[key]

    def _unusable(self, error: BaseException) -> StoreError:
        return StoreError(
            f"{self.root}: its url and the environment are not those of a store that can be asked: "
            f"{reason(str(error))}. Correct the url, or the variable {PREFIX[self.scheme]}_... that "
            "has this value (a line's end in it counts)"
        )

    def _connect(self, kind: str) -> Any:
        limits, prefix = self.limits, PREFIX[self.scheme]
        request = limits.copy if kind == "copy" else limits.request
        options: dict[str, Any] = {
            option: value
            for option in CLIENT_OPTIONS
            if (value := os.environ.get(f"{prefix}_{option.upper()}"))
        }
        seconds = {
            "connect_timeout": limits.connect,
            "read_timeout": limits.stall if kind in ("read", "list") else request,
            "timeout": request,
        }
        options |= {name: timedelta(seconds=value) for name, value in seconds.items()}
        if self.scheme in ("http", "https"):
            options["allow_http"] = self.scheme == "http"
            options["default_headers"] = web_headers(self.root)
        config: dict[str, Any] = {}
        if self.scheme == "s3":
            if "AWS_COPY_IF_NOT_EXISTS" not in os.environ:
                config["copy_if_not_exists"] = "multipart"
            config["disable_bulk_delete"] = True  # which many servers of this protocol lack
        return library().store.from_url(
            self.root,
            config=config or None,
            client_options=options,
            retry_config={
                # parts of an upload are repeated by the library alone, single requests by `call`,
                # and requests of many steps by both
                "max_retries": 0 if kind == "read" else 10,
                "retry_timeout": timedelta(seconds=limits.give_up / (4 if kind == "list" else 1)),
                "backoff": {
                    "init_backoff": timedelta(seconds=limits.backoff),
                    "max_backoff": timedelta(seconds=limits.max_backoff),
                    "base": 2,
                },
            },
        )

    def call(
        self, work: str, url: str, action: Callable[[Any, Any], T],
        kind: str = "read", once: bool = False,
    ) -> T:  # fmt: skip
        """Returns `action(obstore, store)`, repeated while the error is one that may pass.

        Raises FileNotFoundError, FileExistsError, or StoreError saying which `work` on `url` failed.
        """
        with asking():
            return self._repeat(work, url, action, kind, once)

    def _repeat(
        self, work: str, url: str, action: Callable[[Any, Any], T], kind: str, once: bool
    ) -> T:
        start, tries, asked = time.monotonic(), 0, 0.0
        while True:
            tries += 1
            library_ = library()
            try:
                return action(library_, self._store(kind))
            except ShardsError:
                raise
            except (library_.exceptions.BaseError, OSError, ValueError) as error:
                text = str(error)
                if isinstance(error, library_.exceptions.AlreadyExistsError) and work in CREATE:
                    raise FileExistsError(f"{url}: exists") from None
                if isinstance(error, FileNotFoundError) and not NO_BUCKET.search(text):
                    raise FileNotFoundError(f"{url}: no such object") from None
                seconds, throttled = time.monotonic() - start, status_of(error) in THROTTLED
                if once or is_permanent(error, library_) or seconds > self.limits.give_up:
                    raise StoreError(
                        f"{url}: {work} failed after {seconds:.0f} s: {reason(text)}. "
                        + (f"The server asked to wait for {asked:.0f} s. " if asked else "")
                        + self._advice(error, library_)
                    ) from None
            except BaseException as error:
                if type(error).__name__ != PANIC:
                    raise
                raise self._unusable(error) from None
            seconds = min(self.limits.backoff * 2**tries, self.limits.max_backoff)
            pause(seconds * random.uniform(0.5, 1))
            if throttled and tries > 1:  # a single one is most often followed by an answer
                asked = self._asked(url, library_, kind)
                rest = self.limits.give_up - (time.monotonic() - start)
                pause(min(asked, rest))

    def _asked(self, url: str, library_: Any, kind: str) -> float:
        """Returns the seconds that the server asks to wait; 0 if it has not said so before."""
        if self._asks_to_wait:
            headers = web_headers(self.root) if self.scheme in ("http", "https") else {}
            asked = asked_wait(
                url, self.root, library_, self._store(kind), headers, self.limits.connect
            )
            if asked is not None:
                return asked
            self._asks_to_wait = False  # it costs no further requests
        return 0.0

    def _advice(self, error: Exception, library_: Any) -> str:
        text, kinds = str(error), library_.exceptions
        if NO_BUCKET.search(text):
            return f"There is no {self.root}: check the url, or make it"
        if "non-partial response" in text:
            return (
                "The server gives whole objects where a part is asked for, so columns cannot be read "
                "there: use another server, or no proxy before it"
            )
        if isinstance(error, kinds.AlreadyExistsError):
            return "The store still copies to this object, or changes it: run again later"
        if isinstance(error, kinds.NotSupportedError):
            return "This store cannot do that: use another, or a folder"
        if isinstance(error, kinds.PreconditionError):
            return "The object was replaced while it was open: open the column again"
        clock = f"the clock of this machine ({time.strftime('%H:%M:%S', time.gmtime())} UTC)"
        if SKEWED.search(text):
            return f"The store refuses what is signed at another time than its own: set {clock}"
        if EXPIRED.search(text):
            return (
                f"The credentials have expired, or {clock} is wrong: renew {ADVICE[self.scheme]}. "
                "What was written so far stays, so run again"
            )
        nothing_said = self.scheme == "s3" and status_of(error) == 400 and "HEAD" in text
        if refused(error, library_) or nothing_said:  # S3 says just 400 of an expired token
            advice = f"Check {ADVICE[self.scheme]}, and what they permit"
            if self.scheme in ("http", "https"):
                return advice
            return f"{advice}. They may have expired, or {clock} be wrong"
        return f"Check {NETWORK[self.scheme]}; what was written so far stays, so run again"


def pause(seconds: float) -> None:
    """Sleeps; StoreError once the program ends, which would wait for this thread."""
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        if not threading.main_thread().is_alive():
            raise StoreError("the program ended while a request was to be repeated")
        time.sleep(min(rest, SLICE))


def refused(error: Exception, library_: Any) -> bool:
    """Returns whether credentials or a permission is missing."""
    kinds = library_.exceptions
    return (
        isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError))
        or status_of(error) in (401, 403)
        # where credentials are looked for on a machine of a cloud
        or re.search(r"169\.254\.\d+\.\d+|metadata\.google|[Cc]redential", str(error)) is not None
    )


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status in the message of an error; None if there is none."""
    match = re.search(r"status code: (\d{3})", str(error))
    return int(match[1]) if match else None


def is_permanent(error: Exception, library_: Any) -> bool:
    """Returns whether the same request would end in the same error again."""
    kinds, status, text = library_.exceptions, status_of(error), str(error)
    # other work than to create is answered 409 where Azure still copies to the object
    temporary = isinstance(error, (kinds.GenericError, kinds.AlreadyExistsError, OSError))
    bad_request = status == 501 or (
        status is not None and 400 <= status < 500 and status not in (408, 409, 429)
    )
    bad_url = any(word in text for word in ("builder error", "redirect")) or NO_BUCKET.search(text)
    return not temporary or bad_request or bool(bad_url) or refused(error, library_)


def reason(text: str) -> str:
    """Returns the part of obstore's message that a person needs, without keys that a url may hold."""
    line = " ".join(text.partition("Debug source")[0].split())
    return redacted(line)[:400]
