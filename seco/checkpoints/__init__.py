"""Weights on disk: this toolkit's checkpoints and those of others, read without running code."""
