"""What a row of the table of recipes holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The attributes of a recipe that say in words what an optimizer does not do, and how they are titled.
TEXTS: Mapping[str, str] = {
    "batch": "Batch size",
    "schedule": "Learning rate",
    "clipping": "Clipping",
    "decayed": "Weight decay",
    "other": "Also",
}


@dataclass(frozen=True)
class Recipe:
    """The settings that a published result was trained with.

    Attributes:
        name: what `RMSprop.recipe` takes.
        title: whose they are.
        dialect: whose RMSprop it was.
        settings: its settings in that dialect's own words, or torch's where it has none.
        source: where they were read.
        fixes: what must stay as it is, and what it would mean otherwise.
        batch: the batch size.
        schedule: what the learning rate does.
        clipping: what is clipped, before `step` and outside it.
        decayed: what weight decay acts on.
        other: what else belongs to it.
        from_memory: the settings and texts that nobody has looked up.
        assumed: settings that the source does not state -> where their values are from.
    """

    name: str
    title: str
    dialect: str
    settings: Mapping[str, Any]
    source: str
    fixes: str
    batch: str = "not stated"
    schedule: str = "constant"
    clipping: str = "none"
    decayed: str = "none"
    other: str = ""
    from_memory: tuple[str, ...] = ()
    assumed: Mapping[str, str] = field(default_factory=dict)
