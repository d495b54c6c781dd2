"""How a study is run: its commands one after the other, or several at a time."""

from __future__ import annotations
