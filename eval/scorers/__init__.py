"""Scorers that look at single pictures: CLIP score, GenEval, DPG-Bench, GenAI-Bench."""
