"""Where a column is: a folder, an object store, a web server, behind one interface."""

from __future__ import annotations

from .base import WEB, Place
from .client import Limits, NoRanges

__all__ = ["Limits", "NoRanges", "Place", "WEB"]
