"""Scores with their intervals, as they are written and read."""
