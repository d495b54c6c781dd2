"""Prompts of benchmarks: where they are published, how their files are read."""
