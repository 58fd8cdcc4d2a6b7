"""Reads checkpoints of TensorFlow 1 and 2 without TensorFlow."""

from rmsprop.conversion.formats.tensorflow import checkpoint
from rmsprop.conversion.record import Format

FORMATS = (Format("tensorflow", (".index",), checkpoint.sniff, checkpoint.read),)
