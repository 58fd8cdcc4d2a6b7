"""What a user gives as `params`, as a list of tensors or of pairs of name and tensor; else the sentence to write."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from inspect import isgenerator
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rmsprop.printing import shown

_LISTS = {list, tuple}
_METHODS = (MethodType, FunctionType, BuiltinMethodType)


def iterable(params: Any) -> Any:
    """Return `params` if the optimizer can go through it.

    Raises: TypeError, ValueError: anything else, with what to write.
    """
    if isinstance(params, (Tensor, set)):  # the base class has its own sentence for these two
        return params
    if isinstance(params, nn.ParameterList):
        return params
    if isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping | nn.Module):
        if isgenerator(params) and params.gi_frame is None:
            raise ValueError(
                "params is a generator that was used up before, so the optimizer would get an empty parameter list; "
                "call model.parameters() again, or keep list(model.parameters())"
            )
        return params
    kind = type(params).__name__
    advice = _advice(params) or (
        "it takes an iterable of tensors, of pairs of name and tensor, or of dicts that define groups"
    )
    if isinstance(params, (nn.Module, Optimizer, Mapping, *_METHODS)):
        raise TypeError(f"params is {_named(params)}; {advice}")
    raise TypeError(f"params is {shown(params, 60)}, a {kind}; {advice}")


def not_empty(params: Any) -> Any:
    """Return the `params` of a whole optimizer, an iterator's as a list.

    Raises: TypeError, ValueError: nothing that an optimizer can go through, or an iterator without a tensor.
    """
    params = iterable(params)
    if not isinstance(params, Iterator):
        return params
    found = list(params)
    if not found:
        raise ValueError(
            f"optimizer got an empty parameter list: params is a {type(params).__name__} that holds nothing; the "
            "model has no such parameter, or the iterator was used up before: keep list(model.parameters())"
        )
    return found


def listed(params: Any) -> Any:
    """Return a group's parameters as a list.

    Raises:
        TypeError: an entry that is neither a tensor nor a pair of name and tensor.
        ValueError: a tensor whose elements share memory, which no step can write.
    """
    params = iterable(params)
    if isinstance(params, (Tensor, set)):
        return params
    found = list(params)
    for i, given in enumerate(found):
        if isinstance(given, tuple) and not (len(given) == 2 and isinstance(given[0], str)):
            raise TypeError(
                f"params holds the tuple {shown(given, 60)}; a named parameter is a pair of name and tensor"
            )
        p = given[1] if isinstance(given, tuple) else given
        if not isinstance(p, Tensor):
            raise TypeError(_not_a_tensor(i, p))
        if is_lazy(p) or p.layout != torch.strided:
            continue
        if shares_elements(p):
            raise ValueError(
                f"parameter {i} has elements that share memory (shape {tuple(p.shape)}, strides {p.stride()}), and "
                "a step cannot write each of them; give its clone()"
            )
    return found


def check_groups(groups: Any) -> None:
    """Refuse param_groups that no step can go through, after an edit.

    Raises: TypeError, ValueError: in one sentence, with the group and what it holds.
    """
    if not isinstance(groups, Collection) or isinstance(groups, str | bytes | Mapping):
        raise TypeError(f"param_groups is {shown(groups)}, a {type(groups).__name__}; it takes a list of dicts")
    seen: dict[int, int] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(
                f"group {i} of param_groups is {shown(group)}, a {type(group).__name__}; a group is a dict"
            )
        if "params" not in group:
            raise ValueError(f"group {i} has lost its params; remove the group from param_groups, or give it a list")
        held = group["params"]
        many = isinstance(held, Sized) and isinstance(held, Iterable)
        if not many or isinstance(held, (str, bytes, Mapping, set, Tensor)):
            raise TypeError(
                f"params of group {i} is {shown(held, 60)}, a {type(held).__name__}; it takes a list of tensors, "
                "which every step goes through anew"
            )
        for index, p in enumerate(held):
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params of group {i} holds {shown(p, 60)}, a {type(p).__name__}, at index {index}; it takes "
                    "tensors"
                )
            if id(p) in seen:
                raise ValueError(
                    f"parameter {index} of group {i} is listed in group {seen[id(p)]} already; a step moves it once, "
                    "so list it once"
                )
            seen[id(p)] = i


def are_lists(groups: Any) -> bool:
    """Whether groups and their params are lists or tuples, and no parameter is listed twice: the quick look."""
    kinds = {type(groups), *(type(group["params"]) for group in groups)} if type(groups) in _LISTS else {None}
    ids = [id(p) for group in groups for p in group["params"]] if kinds <= _LISTS else []
    return kinds <= _LISTS and len(set(ids)) == len(ids)


def _not_a_tensor(i: int, given: Any) -> str:
    """The sentence for an entry of params that is not a tensor; it begins as torch's does."""
    kind = type(given).__name__ if hasattr(given, "__qualname__") else torch.typename(given)
    sentence = f"optimizer can only optimize Tensors, but one of the params is {kind}"
    if isinstance(given, Mapping):
        advice = "dicts define groups, and stand in a list of groups only, each with its own params"
        return f"{sentence}: {advice if 'params' in given else _advice(given)}"
    if isinstance(given, Iterator) or (isinstance(given, Iterable) and not isinstance(given, nn.Module | str)):
        return f"{sentence}: entry {i} holds several; write [*model.parameters()], or give model.parameters() itself"
    advice = _advice(given)
    return f"{sentence}: {advice}" if advice else sentence


def _advice(given: Any) -> str:
    """What to write instead of that, or nothing where that is not known."""
    if isinstance(given, nn.Module):
        return "write RMSprop(model.parameters())"
    if isinstance(given, Optimizer):
        return "write RMSprop(optimizer.param_groups) to take over its groups"
    if isinstance(given, _METHODS):
        return f"call it: write model.{given.__name__}()" if "parameters" in given.__name__ else "call it"
    if not isinstance(given, Mapping):
        return ""
    if "params" in given:
        return "one dict defines one group, and groups stand in a list: write RMSprop([{'params': ...}])"
    if "param_groups" in given:
        return "build the optimizer with model.parameters(), and give the state dict to its load_state_dict"
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if tensors and not any(x.requires_grad or isinstance(x, nn.Parameter) for x in tensors):
        return "the tensors of a state dict are not the model's own; write model.named_parameters()"
    return "write model.named_parameters(), or the dict's .items()"


def _named(given: Any) -> str:
    """What was given, without its contents."""
    if isinstance(given, nn.Module):
        return f"a model ({type(given).__name__})"
    if isinstance(given, _METHODS):
        return f"the method {given.__name__}, which was not called"
    if isinstance(given, Optimizer):
        return f"an optimizer ({type(given).__name__})"
    first = f", the first {shown(next(iter(given)), 40)}" if given else ""
    return f"a {type(given).__name__} with {len(given)} keys{first}"


def shares_elements(p: Tensor) -> bool:
    """Whether two elements of a tensor are one place in memory."""
    if p.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach and p.numel():
            extent = 1 + sum(step * (n - 1) for step, n in zip(p.stride(), p.shape, strict=True))
            if stride == 0 or extent < p.numel():
                return True
            offsets = torch.zeros((), dtype=torch.int64, device="cpu")
            for n, step in zip(p.shape, p.stride(), strict=True):
                offsets = offsets.unsqueeze(-1) + torch.arange(n, device="cpu") * step
            distinct: Tensor = torch.unique(offsets)
            return distinct.numel() < p.numel()
        reach += stride * max(size - 1, 0)
    return False
