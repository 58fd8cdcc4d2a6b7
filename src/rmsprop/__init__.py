"""A drop-in torch.optim.RMSprop that reproduces any framework's RMSprop, and is faster.

    from rmsprop import RMSprop          # replaces: from torch.optim import RMSprop

Importing this package imports nothing else; torch is imported when `RMSprop` is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmsprop import checkpoint as checkpoint
    from rmsprop import functional as functional
    from rmsprop.conversion import ConversionReport as ConversionReport
    from rmsprop.conversion import convert as convert
    from rmsprop.diagnose.effective_lr import LayerRecord as LayerRecord
    from rmsprop.diagnose.effective_lr import Recorder as Recorder
    from rmsprop.diagnose.effective_lr import effective_lr as effective_lr
    from rmsprop.diagnose.lint import Finding as Finding
    from rmsprop.dialects import DIALECTS as DIALECTS
    from rmsprop.in_backward import step_in_backward as step_in_backward
    from rmsprop.memory import Estimate as Estimate
    from rmsprop.memory import estimate as estimate
    from rmsprop.optimizer import RMSprop as RMSprop
    from rmsprop.recipes import RECIPES as RECIPES
    from rmsprop.recipes import recipe as recipe
    from rmsprop.spec import Hyper as Hyper
    from rmsprop.spec import Rule as Rule
    from rmsprop.state.loading import LoadReport as LoadReport
    from rmsprop.tensors.nonfinite import Skipped as Skipped
    from rmsprop.translation import Translation as Translation
    from rmsprop.translation import translate as translate

# Public names, and the module of each that is not itself a module.
_HOMES = {
    "RMSprop": "rmsprop.optimizer",
    "step_in_backward": "rmsprop.in_backward",
    "DIALECTS": "rmsprop.dialects",
    "RECIPES": "rmsprop.recipes",
    "recipe": "rmsprop.recipes",
    "convert": "rmsprop.conversion",
    "ConversionReport": "rmsprop.conversion",
    "translate": "rmsprop.translation",
    "Translation": "rmsprop.translation",
    "estimate": "rmsprop.memory",
    "Estimate": "rmsprop.memory",
    "effective_lr": "rmsprop.diagnose.effective_lr",
    "Recorder": "rmsprop.diagnose.effective_lr",
    "LayerRecord": "rmsprop.diagnose.effective_lr",
    "Finding": "rmsprop.diagnose.lint",
    "LoadReport": "rmsprop.state.loading",
    "Skipped": "rmsprop.tensors.nonfinite",
    "Rule": "rmsprop.spec",
    "Hyper": "rmsprop.spec",
}
_MODULES = ("checkpoint", "functional")

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"rmsprop.{name}")
    if name == "__version__":
        return import_module("rmsprop.printing").version()
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rmsprop' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
