"""Checks that a run is what its user expects: explain, lint, effective learning rates. Imports settings, kernels."""
