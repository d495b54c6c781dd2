"""How long a server asks to wait that answers 429 or 503: its `Retry-After`, which the client library
neither obeys nor shows. One plain request, signed by the library or with a token, looks for it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request

THROTTLED = (429, 503)
VALID = timedelta(minutes=5)  # of a signature
GOOGLE = "https://storage.googleapis.com"
# Where the client library looks for Google's credentials, the first that is set, and then in a file
# of the user's home. Where there are none it asks the machine for a token.
CREDENTIALS = (
    "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT",
    "GOOGLE_APPLICATION_CREDENTIALS",
)  # fmt: skip
LOGIN = ".config/gcloud/application_default_credentials.json"
MACHINE = "computeMetadata/v1/instance/service-accounts/default/token"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: another server must not see the token, and this one has answered."""

    def redirect_request(self, *_: Any) -> None:
        return None


def seconds_asked(value: str | None) -> float | None:
    """Returns the seconds of a `Retry-After`, a number or a date; None if it is neither."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def asked_wait(
    url: str, root: str, library: Any, store: Any, headers: Mapping[str, str], timeout: float
) -> float | None:
    """Returns the seconds that the server asks to wait before the next request for an object: 0 if it
    answers, None if it does not say.
    """
    try:
        request = plain_request(url, root, library, store, headers, timeout)
    except Exception:  # keys of a kind that sign nothing; whatever it is, the wait goes on
        return None
    if request is None:
        return None
    try:
        urllib.request.build_opener(NoRedirect).open(request, timeout=timeout).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in THROTTLED:
                return seconds_asked(error.headers.get("Retry-After"))
    except (OSError, ValueError, HTTPException):
        return None
    return 0.0


def plain_request(
    url: str, root: str, library: Any, store: Any, headers: Mapping[str, str], timeout: float
) -> Request | None:
    """Returns a HEAD request for an object, with what shows who asks; None where only the client
    library can show that.
    """
    scheme, path = root.partition("://")[0], url[len(root) :].strip("/")
    if scheme in ("http", "https"):
        return Request(quote(url, safe="/:[]%"), method="HEAD", headers=dict(headers))
    if scheme == "gs":
        return google_request(root.partition("://")[2], path, library, store, timeout)
    return Request(library.sign(store, "HEAD", path, VALID), method="HEAD")


def google_request(
    bucket: str, path: str, library: Any, store: Any, timeout: float
) -> Request | None:
    """Returns that request for Google's storage, with a token or, made with a key, a signature."""
    credentials = google_credentials()
    server = os.environ.get("GOOGLE_BASE_URL") or credentials.get("gcs_base_url") or GOOGLE
    request = Request(f"{server}/{bucket}/{quote(path)}", method="HEAD")
    if os.environ.get("GOOGLE_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes", "y"):
        return request
    token = os.environ.get("GOOGLE_BEARER_TOKEN")
    if not token:
        if credentials.get("disable_oauth"):
            return request
        if "private_key" in credentials:
            return Request(library.sign(store, "HEAD", path, VALID), method="HEAD")
        if credentials:  # a user's own login
            return None
        token = machine_token(timeout)
    request.add_header("Authorization", f"Bearer {token}")
    return request


def google_credentials() -> dict[str, Any]:
    """Returns the key or login that the client library uses for Google; {} if there is none."""
    text = os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY")
    if text is None:
        given = next((os.environ[name] for name in CREDENTIALS if name in os.environ), None)
        path = Path.home() / LOGIN if given is None else Path(given)
        if given is None and not path.exists():
            return {}
        text = path.read_text()
    credentials: dict[str, Any] = json.loads(text)
    return credentials


def machine_token(timeout: float) -> str:
    """Returns the token of the service account that Google gave to this machine."""
    host = os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_ROOT")
    request = Request(
        f"http://{host or 'metadata.google.internal'}/{MACHINE}",
        headers={"Metadata-Flavor": "Google"},
    )
    with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as answer:
        return str(json.load(answer)["access_token"])
