"""Is the run what its user thinks it is: explain, lint, effective learning rates. Imports settings, state."""
