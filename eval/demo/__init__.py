"""The demo: real pictures, two small VAEs, two small transformers, and a report that compares them."""

from __future__ import annotations
