"""Optimizers of other packages, read from their one file: the packages themselves import much more than that."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def _folder(package: str) -> Path | None:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def timm() -> Any:
    """timm.optim.rmsprop_tf.RMSpropTF, or None where timm is not installed."""
    folder = _folder("timm")
    if folder is None:
        return None
    if "timm_optim_alone" not in sys.modules:
        alone = types.ModuleType("timm_optim_alone")
        alone.__path__ = [str(folder / "optim")]
        sys.modules["timm_optim_alone"] = alone
    return importlib.import_module("timm_optim_alone.rmsprop_tf").RMSpropTF


def sb3() -> Any:
    """stable_baselines3's RMSpropTFLike, or None where it is not installed."""
    folder = _folder("stable_baselines3")
    if folder is None:
        return None
    path = folder / "common" / "sb2_compat" / "rmsprop_tf_like.py"
    spec = importlib.util.spec_from_file_location("rmsprop_tf_like_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RMSpropTFLike
