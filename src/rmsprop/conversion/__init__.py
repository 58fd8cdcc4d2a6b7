"""Conversion of optimizer state and checkpoint files between frameworks.

state, report = rmsprop.convert(state, "tensorflow1", "torch", lr=1e-3)     # arrays: conversion/state.py
rmsprop convert model.keras out.pt                                          # files: conversion/file.py
"""

from rmsprop.conversion.record import Checkpoint, ConversionReport, Format, Unreadable
from rmsprop.conversion.state import Converted, convert

__all__ = ["Checkpoint", "ConversionReport", "Converted", "Format", "Unreadable", "convert"]
