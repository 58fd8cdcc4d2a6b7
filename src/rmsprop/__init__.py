"""RMSprop, owned completely: the exact rule, under the exact name, on every device.

    from rmsprop import RMSprop          # replaces: from torch.optim import RMSprop

Importing this package imports nothing else; torch enters when `RMSprop` is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmsprop import checkpoint as checkpoint
    from rmsprop import functional as functional
    from rmsprop.conversion import convert as convert
    from rmsprop.dialects import DIALECTS as DIALECTS
    from rmsprop.in_backward import step_in_backward as step_in_backward
    from rmsprop.optimizer import RMSprop as RMSprop
    from rmsprop.recipes import recipe as recipe
    from rmsprop.spec import Hyper as Hyper
    from rmsprop.spec import Rule as Rule
    from rmsprop.translation import Translation as Translation
    from rmsprop.translation import translate as translate

__version__ = "0.1.0"

__all__ = [
    "DIALECTS",
    "Hyper",
    "RMSprop",
    "Rule",
    "Translation",
    "__version__",
    "checkpoint",
    "convert",
    "functional",
    "recipe",
    "step_in_backward",
    "translate",
]

_HOMES = {
    "RMSprop": "rmsprop.optimizer",
    "step_in_backward": "rmsprop.in_backward",
    "DIALECTS": "rmsprop.dialects",
    "convert": "rmsprop.conversion",
    "Rule": "rmsprop.spec",
    "Hyper": "rmsprop.spec",
    "recipe": "rmsprop.recipes",
    "Translation": "rmsprop.translation",
    "translate": "rmsprop.translation",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "functional"):
        return import_module(f"rmsprop.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rmsprop' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
