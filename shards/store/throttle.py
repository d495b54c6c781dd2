"""How long a server asks to wait that answers 429 or 503: its `Retry-After`, which the client library
neither obeys nor shows. One plain request, signed by the library, looks for it.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

THROTTLED = (429, 503)
SIGNED = ("s3", "az")  # whose requests are signed here, without a request to others
VALID = timedelta(minutes=5)  # of a signature


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
    if root.startswith(("http://", "https://")):
        quoted = quote(url, safe="/:[]%")
        request = urllib.request.Request(quoted, method="HEAD", headers=dict(headers))
    elif root.startswith(SIGNED):
        try:
            signed = library.sign(store, "HEAD", url[len(root) :].strip("/"), VALID)
        except Exception:  # keys of a kind that sign nothing; whatever it is, the wait goes on
            return None
        request = urllib.request.Request(signed, method="HEAD")
    else:
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
