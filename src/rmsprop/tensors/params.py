"""Validates `params`, and returns them as a list of tensors or of (name, tensor) pairs."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from inspect import isgenerator
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rmsprop.printing import shown, with_article

_LISTS = {list, tuple}
_METHODS = (MethodType, FunctionType, BuiltinMethodType)


def iterable(params: Any) -> Any:
    """Return `params` if the optimizer can iterate over it.

    Raises: TypeError or ValueError for anything else, with what to write instead.
    """
    if isinstance(params, (Tensor, set)):  # the base class has its own message for these two
        return params
    if isinstance(params, nn.ParameterList):
        return params
    if isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping | nn.Module):
        if isgenerator(params) and params.gi_frame is None:
            raise ValueError(
                "params is a generator that was used up before, so the optimizer would get an empty parameter list; "
                "call model.parameters() again, or store list(model.parameters())"
            )
        return params
    kind = type(params).__name__
    advice = _advice(params) or (
        "it takes an iterable of tensors, of (name, tensor) pairs, or of dicts that define groups"
    )
    if isinstance(params, (nn.Module, Optimizer, Mapping, *_METHODS)):
        raise TypeError(f"params is {_described(params)}; {advice}")
    raise TypeError(f"params is {shown(params, 60)}, {with_article(kind)}; {advice}")


def not_empty(params: Any) -> Any:
    """Return the `params` of a whole optimizer, with an iterator turned into a list.

    Raises: TypeError or ValueError if the optimizer cannot iterate over it, or if it is an empty iterator.
    """
    params = iterable(params)
    if not isinstance(params, Iterator):
        return params
    found = list(params)
    if not found:
        raise ValueError(
            f"optimizer got an empty parameter list: params is {with_article(type(params).__name__)} that yields "
            "nothing; the model has no such parameter, or the iterator was used up before: store "
            "list(model.parameters())"
        )
    return found


def listed(params: Any) -> Any:
    """Return a group's parameters as a list.

    Raises:
        TypeError: an entry that is neither a tensor nor a (name, tensor) pair.
        ValueError: a tensor whose elements share memory, so that a step cannot write each of them.
    """
    params = iterable(params)
    if isinstance(params, (Tensor, set)):
        return params
    found = list(params)
    for i, given in enumerate(found):
        if isinstance(given, tuple) and not (len(given) == 2 and isinstance(given[0], str)):
            raise TypeError(f"params holds the tuple {shown(given, 60)}; a named parameter is a (name, tensor) pair")
        p = given[1] if isinstance(given, tuple) else given
        if not isinstance(p, Tensor):
            raise TypeError(_not_a_tensor(i, p))
        if is_lazy(p) or p.layout != torch.strided:
            continue
        if shares_elements(p):
            raise ValueError(
                f"parameter {i} has elements that share memory (shape {tuple(p.shape)}, strides {p.stride()}), so a "
                "step cannot write each of them; give its clone()"
            )
    return found


def check_groups(groups: Any) -> None:
    """Refuse edited param_groups that a step cannot iterate over.

    Raises: TypeError or ValueError, which names the group and what it holds.
    """
    if not isinstance(groups, Collection) or isinstance(groups, str | bytes | Mapping):
        kind = with_article(type(groups).__name__)
        raise TypeError(f"param_groups is {shown(groups)}, {kind}; it takes a list of dicts")
    seen: dict[int, int] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            kind = with_article(type(group).__name__)
            raise TypeError(f"group {i} of param_groups is {shown(group)}, {kind}; a group is a dict")
        if "params" not in group:
            raise ValueError(f"group {i} has lost its params; remove the group from param_groups, or give it a list")
        held = group["params"]
        many = isinstance(held, Sized) and isinstance(held, Iterable)
        if not many or isinstance(held, (str, bytes, Mapping, set, Tensor)):
            kind = with_article(type(held).__name__)
            raise TypeError(
                f"params of group {i} is {shown(held, 60)}, {kind}; it takes a list of tensors, since every step "
                "iterates over it again"
            )
        for index, p in enumerate(held):
            if not isinstance(p, Tensor):
                kind = with_article(type(p).__name__)
                raise TypeError(
                    f"params of group {i} holds {shown(p, 60)}, {kind}, at index {index}; it takes tensors"
                )
            if id(p) in seen:
                raise ValueError(
                    f"parameter {index} of group {i} is already listed in group {seen[id(p)]}; list each parameter "
                    "once"
                )
            seen[id(p)] = i


def are_lists(groups: Any) -> bool:
    """Return whether groups and their params are lists or tuples without duplicate parameters: the quick check."""
    kinds = {type(groups), *(type(group["params"]) for group in groups)} if type(groups) in _LISTS else {None}
    ids = [id(p) for group in groups for p in group["params"]] if kinds <= _LISTS else []
    return kinds <= _LISTS and len(set(ids)) == len(ids)


def _not_a_tensor(i: int, given: Any) -> str:
    """Return the message for an entry of params that is not a tensor. It begins as torch's does."""
    kind = type(given).__name__ if hasattr(given, "__qualname__") else torch.typename(given)
    message = f"optimizer can only optimize Tensors, but one of the params is {kind}"
    if isinstance(given, Mapping):
        advice = "dicts define groups; give a list of such dicts only, each with its own params"
        return f"{message}: {advice if 'params' in given else _advice(given)}"
    if isinstance(given, Iterator) or (isinstance(given, Iterable) and not isinstance(given, nn.Module | str)):
        return f"{message}: entry {i} holds several; write [*model.parameters()], or give model.parameters() itself"
    advice = _advice(given)
    return f"{message}: {advice}" if advice else message


def _advice(given: Any) -> str:
    """Return what to write instead of a value, or "" if that is unknown."""
    if isinstance(given, nn.Module):
        return "write RMSprop(model.parameters())"
    if isinstance(given, Optimizer):
        return "write RMSprop(optimizer.param_groups) to take over its groups"
    if isinstance(given, _METHODS):
        return f"call it: write model.{given.__name__}()" if "parameters" in given.__name__ else "call it"
    if not isinstance(given, Mapping):
        return ""
    if "params" in given:
        return "a dict defines one group, and groups belong in a list: write RMSprop([{'params': ...}])"
    if "param_groups" in given:
        return "build the optimizer with model.parameters(), and give the state dict to its load_state_dict"
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if tensors and not any(x.requires_grad or isinstance(x, nn.Parameter) for x in tensors):
        return "the tensors of a state dict are not the model's own; write model.named_parameters()"
    return "write model.named_parameters(), or the dict's .items()"


def _described(given: Any) -> str:
    """Return a description of a value without its contents."""
    if isinstance(given, nn.Module):
        return f"a model ({type(given).__name__})"
    if isinstance(given, _METHODS):
        return f"the method {given.__name__}, which was not called"
    if isinstance(given, Optimizer):
        return f"an optimizer ({type(given).__name__})"
    first = f", the first {shown(next(iter(given)), 40)}" if given else ""
    return f"{with_article(type(given).__name__)} with {len(given)} keys{first}"


def shares_elements(p: Tensor) -> bool:
    """Return whether two elements of a tensor share memory."""
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
