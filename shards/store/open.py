"""Which store a path or url names."""

from __future__ import annotations

from ..errors import NotAColumn
from ..places import local_path, path_of
from .base import REMOTE, WEB, Place, Store
from .client import Limits
from .local import LocalStore


def open_store(url: Place, limits: Limits | None = None) -> Store:
    """Returns the store at a path or url: a folder, `file://`, `s3://`, `gs://`, `az://`, or, to read single
    files, `http://` or `https://`. `limits` of waiting hold for what is remote.
    """
    if isinstance(url, Store):
        return url
    scheme = str(url).partition("://")[0] if "://" in str(url) else ""
    if scheme in REMOTE:
        from .object_store import RemoteStore

        return RemoteStore(str(url), limits)
    if scheme in WEB:
        from .http import WebStore

        return WebStore(str(url), limits)
    if scheme == "file":
        return LocalStore(path_of(str(url)))
    if scheme:
        raise NotAColumn(
            f"{url}: found the scheme {scheme!r}, expected a path or one of file://, "
            + ", ".join(f"{name}://" for name in (*REMOTE, *WEB))
        )
    return LocalStore(local_path(url))
