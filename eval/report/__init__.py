"""Pages and tables that compare sets of pictures."""

from __future__ import annotations
