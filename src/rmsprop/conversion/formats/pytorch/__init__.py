"""Reads PyTorch files without running a pickle: archives, older files, folders and distributed checkpoints."""

from rmsprop.conversion.formats.pytorch import dcp, file, folder, write
from rmsprop.conversion.record import Format

FORMATS = (
    Format("torch", file.SUFFIXES, file.sniff, file.read, write.write, chooses=True, outline=file.outline),
    Format("torch dcp", (), dcp.sniff, dcp.read, chooses=True, outline=dcp.outline),
    Format("torch folder", (), folder.sniff, folder.read, chooses=True, outline=folder.outline),
)
