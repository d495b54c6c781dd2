"""Prompts in, images out, scores with their uncertainty: sample, reconstruct and compare."""
