"""What a study would make, take over and cost, before it starts."""

from __future__ import annotations
