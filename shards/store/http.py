"""Files of a web server, http:// or https://, to be read only: a source's tars may be there,
columns cannot.

    https://huggingface.co/datasets/<owner>/<name>/resolve/main/<file>

A server is asked for sizes and ranges of single files; it has no listing that could be trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from ..errors import StoreError
from ..printing import redacted
from .client import Client, Limits
from .object_store import RemoteStore

SERVER = re.compile(r"(\[[^\]]*\]|[^:@]*)(:\d*)?")  # a host, perhaps with a port
FORBIDS = re.compile(r"status code: (400|403|501)\b")


class WebStore(RemoteStore):
    """A folder of a web server. Names are as people read them: spaces and accents, not %20."""

    # Servers compare the tag in their own ways, or where they redirect to; the answers are looked at.
    conditional = False

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise StoreError(f"{redacted(url)}: found no url ({error})") from None
        path = unquote(parts.path).strip("/")
        faults = {
            "a query (`?...`): files behind signed or parametrised urls cannot be asked for by "
            "range": "?" in url,
            "a fragment (`#...`)": "#" in url,
            "a user or password": not SERVER.fullmatch(parts.netloc),
            "no server": not parts.netloc,
            "empty parts or `..` in its path": {"", ".", ".."}
            & set(path.split("/") if path else []),
        }
        for what, present in faults.items():
            if present:
                raise StoreError(
                    f"{redacted(url).partition('?')[0]}: found {what}. Expected {parts.scheme}://<server>/"
                    "<path> alone; download such files first and name them by their paths"
                )
        super().__init__(f"{parts.scheme}://{parts.netloc}", limits)
        self._client = Client(f"{parts.scheme}://{parts.netloc.lower()}", limits or Limits())
        self._prefix = path
        self.url = url.rstrip("/")

    def _head(self, name: str) -> dict[str, Any]:
        """Asks by HEAD, or where a server forbids that (for urls signed for GET), by the first byte."""
        try:
            return super()._head(name)
        except (FileNotFoundError, StoreError) as error:  # 405 counts as not found
            if isinstance(error, StoreError) and not FORBIDS.search(str(error)):
                raise

            def get(library: Any, store: Any) -> dict[str, Any]:
                return dict(library.get(store, self.key(name), options={"range": (0, 1)}).meta)

            try:
                meta: dict[str, Any] = self.call("looking up", name, get)
            except (FileNotFoundError, StoreError):
                raise error from None
            return meta

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StoreError(
            f"{self.url}: a web server is for reading tars only. Columns are written to a folder, "
            "or to s3://, gs:// or az://"
        )

    put_if_absent = replace = delete = move = staged = _refuse

    def list(self, prefix: str = "") -> Sequence[tuple[str, int]]:  # type: ignore[override]  # never
        self._refuse()

    def folders(self) -> Sequence[str]:
        self._refuse()

    def stale_temporaries(self, seconds: float) -> Sequence[str]:
        self._refuse()
