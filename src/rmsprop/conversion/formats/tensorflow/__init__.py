"""Checkpoints of TensorFlow 1 and 2, read without TensorFlow, and not written."""

from rmsprop.conversion.formats.tensorflow import checkpoint
from rmsprop.conversion.record import Format

FORMATS = (Format("tensorflow", (".index",), checkpoint.sniff, checkpoint.read),)
