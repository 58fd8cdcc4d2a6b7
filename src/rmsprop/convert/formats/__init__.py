"""The files that a checkpoint may come in: one row per format, asked in this order."""

from __future__ import annotations

from rmsprop.convert.formats import safetensors_file, torch_file, torch_write
from rmsprop.convert.record import Format

FORMATS: tuple[Format, ...] = (
    Format("torch", torch_file.SUFFIXES, torch_file.sniff, torch_file.read, torch_write.write),
    Format("safetensors", (".safetensors",), safetensors_file.sniff, safetensors_file.read, safetensors_file.write),
)
