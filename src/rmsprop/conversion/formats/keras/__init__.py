"""Reads and writes the files of every Keras: .keras and .weights.h5 of Keras 3, and HDF5 of earlier versions."""

from rmsprop.conversion.formats.keras import h5, keras3, write
from rmsprop.conversion.record import Format

FORMATS = (
    Format("keras", (".keras",), keras3.sniff_archive, keras3.read, write.write_archive, asks=True, template=True),
    Format(
        "keras weights",
        (".weights.h5",),
        keras3.sniff_weights,
        keras3.read,
        write.write_weights,
        asks=True,
        template=True,
    ),
    Format("keras hdf5", (".h5", ".hdf5"), h5.sniff, h5.read, write.write_h5, template=True),
)
