from __future__ import annotations

from tests.demo.drawn import data  # noqa: F401 - a fixture
