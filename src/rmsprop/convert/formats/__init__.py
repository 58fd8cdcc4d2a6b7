"""The files that a checkpoint may come in: one row per format."""

from __future__ import annotations

from ..record import Format

# Asked in this order; a format's module is imported when the row is used, so a missing library costs nothing until then.
FORMATS: tuple[Format, ...] = ()
