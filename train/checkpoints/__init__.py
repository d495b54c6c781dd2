"""Checkpoints of any world size, weights to start from, the reference's layout."""
