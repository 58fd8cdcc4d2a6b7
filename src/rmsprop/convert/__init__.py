"""Optimizer state between dialects, and checkpoints between frameworks."""
