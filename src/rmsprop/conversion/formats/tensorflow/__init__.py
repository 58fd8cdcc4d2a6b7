"""Reads checkpoints of TensorFlow 1 and 2 without TensorFlow."""

from rmsprop.conversion.formats.tensorflow import checkpoint
from rmsprop.conversion.record import Format

FORMATS = (
    Format(
        "tensorflow",
        (".index",),
        checkpoint.sniff,
        checkpoint.read,
        checkpoint.write,
        template=True,
        parts=(".data-00000-of-00001", ".index"),
    ),
)
