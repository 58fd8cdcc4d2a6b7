"""The definition of a recipe: the fields of a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The attributes of a recipe that describe in prose what an optimizer does not do, with their titles.
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
        name: the name that `RMSprop.recipe` takes.
        title: the published result.
        dialect: the dialect of the RMSprop that it used.
        settings: its settings under that dialect's argument names.
        averaging: the average of the weights: `ema` and its companions, under our names.
        source: the paper, or the file and version.
        fixes: the properties of the rule that must not change, and the reason.
        batch: the batch size.
        schedule: the learning-rate schedule.
        clipping: the clipping that is done before `step`, outside the optimizer.
        decayed: the parameters that weight decay applies to.
        other: further circumstances.
        from_memory: the settings and texts that have not been verified.
        assumed: settings that the source does not state -> the origin of their values.
    """

    name: str
    title: str
    dialect: str
    settings: Mapping[str, Any]
    source: str
    fixes: str
    averaging: Mapping[str, Any] = field(default_factory=dict)
    batch: str = "not stated"
    schedule: str = "constant"
    clipping: str = "none"
    decayed: str = "none"
    other: str = ""
    from_memory: tuple[str, ...] = ()
    assumed: Mapping[str, str] = field(default_factory=dict)
