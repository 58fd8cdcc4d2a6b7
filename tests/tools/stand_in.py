"""The CPU in a GPU's place: backend="triton" takes its tensors, and its launches run on ptx_machine.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from narrowed import again, identical
from ptx_machine import Launcher, machine

from rmsprop import kernels
from rmsprop.kernels import Backend, triton
from rmsprop.kernels.cpu import refuse_call
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket

KERNELS = triton.load()


@contextmanager
def cpu_as_gpu(launcher: type[Launcher]) -> Iterator[None]:
    """The machine, with the CPU as the device that backend="triton" takes."""
    others = (own for own in kernels.BACKENDS if own.name != "triton")

    def refuse(rule: Rule, bucket: Bucket) -> str | None:
        return refuse_call(bucket) or triton.refuse_tensors(rule, bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "refuse", refuse)
        patch.setattr(kernels, "BACKENDS", (Backend("triton", refuse, triton.step), *others))
        patch.setattr(triton, "_tables", type(triton._tables)())
        patch.setattr(launcher, "backwards", False)
        launcher.ran.clear()
        yield


def gpu_fixtures() -> tuple[Any, Any]:
    """Return two fixtures for a module of tests: the machine, and the machine in a GPU's place."""

    @pytest.fixture(scope="module")
    def h100() -> Iterator[type[Launcher]]:
        with machine(*(getattr(KERNELS, name) for name in KERNELS.__all__)) as launcher:
            yield launcher

    @pytest.fixture
    def gpu(h100: type[Launcher]) -> Iterator[type[Launcher]]:
        with cpu_as_gpu(h100):
            yield h100

    return h100, gpu


def stepped(launcher: type[Launcher], rule: Rule, hyper: Hyper, before: Bucket) -> Bucket:
    """The step of the compiled kernel, whose threads may run in any order."""
    found = []
    for launcher.backwards in (True, False):
        found.append(again(before))
        triton.step(rule, hyper, found[-1])
    assert identical(*found)
    for mine, given in zip(found[0].grad, before.grad, strict=True):
        assert torch.equal(mine.nan_to_num(), given.nan_to_num()), "the step edited a gradient"
    return found[0]
