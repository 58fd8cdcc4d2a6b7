"""Comparison of nested values."""

from collections import OrderedDict

import numpy as np
import torch


def same(one, other):
    """Whether two nested values are of the same kinds and have the same bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (one, other))
        return bool((a.contiguous().view(-1).view(torch.uint8) == b.contiguous().view(-1).view(torch.uint8)).all())
    if isinstance(one, dict):
        ordered = isinstance(one, OrderedDict) and list(one) != list(other)
        return not ordered and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return repr(one) == repr(other)
