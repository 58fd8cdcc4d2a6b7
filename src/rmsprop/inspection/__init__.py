"""A run seen from outside: a checkpoint file, its page, a training script. Imports conversion, diagnose."""
