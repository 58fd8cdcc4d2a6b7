"""Which tensors step together, and who takes them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rmsprop import RMSprop, kernels
from rmsprop.spec import Rule
from rmsprop.tensors.bucket import Bucket


class Tagged(torch.Tensor):
    """A tensor subclass, as DTensor is one."""


def test_a_group_of_many_kinds_steps_as_its_members_would_alone():
    """Mixed dtypes, complex numbers, subclasses and shapes in one group: each as if it were alone."""
    values = [
        torch.randn(3),
        torch.randn(2, dtype=torch.float64),
        torch.randn(4, dtype=torch.bfloat16),
        torch.randn(5),
        torch.randn(2, 2, dtype=torch.complex64),
        torch.randn(3).as_subclass(Tagged),
        torch.randn(6, dtype=torch.float64),
    ]
    together = [nn.Parameter(x.clone()) for x in values]
    alone = [nn.Parameter(x.clone()) for x in values]
    settings = dict(momentum=0.9, centered=True, weight_decay=0.1, bias_correction=True, eps=0.1)
    one = RMSprop(together, **settings)
    many = [RMSprop([p], **settings) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        for optimizer in many:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert_close(p.detach(), q.detach(), rtol=0, atol=0)


def test_a_bucket_splits_by_device_dtype_and_type_and_keeps_the_order():
    """Plain tensors and parameters mix; dtypes and subclasses do not."""
    params = [torch.ones(1), nn.Parameter(torch.ones(2)), torch.ones(3).double(), torch.ones(4).as_subclass(Tagged)]
    whole = Bucket(params, list(params), {"square_avg": list(params), "step": list(params)})
    parts = list(whole.split())
    assert [[p.numel() for p in part.param] for part in parts] == [[1, 2], [3], [4]]
    assert list(Bucket().split()) == []
    same = Bucket(param=params[:2], grad=params[:2])
    assert next(same.split()) is same


def test_a_backend_asked_for_by_name_raises_its_reason():
    """`auto` takes the first that does not refuse; a name raises; explain() lists every reason."""
    bucket = Bucket(param=[torch.ones(1)], foreach=True, differentiable=True)
    with pytest.raises(
        RuntimeError, match="backend='eager' cannot take this step: eager refuses: foreach=True keeps"
    ):
        kernels.pick("eager", Rule(), bucket)
    with pytest.raises(RuntimeError, match="backend='auto' cannot take this step"):
        kernels.pick("auto", Rule(), bucket)
    reasons = dict(kernels.explain(Rule(), bucket))
    assert "foreach=True" in reasons["eager"]
    assert set(reasons) == {backend.name for backend in kernels.BACKENDS}
    assert dict(kernels.explain(Rule(), Bucket(param=[torch.ones(1)])))["eager"] is None


def test_large_and_small_tensors_step_in_parts_with_the_same_result():
    """How foreach packs tensors on a CPU changes no number."""
    shapes = [(10,), (200_000,), (7,), (300_000,), (5,), (100_000,), (100_000,), (100_000,)]
    values = [torch.randn(shape) for shape in shapes]
    ends = []
    for foreach in (None, True, False):
        params = [nn.Parameter(x.clone()) for x in values]
        optimizer = RMSprop(params, foreach=foreach, momentum=0.9, backend="eager")
        for t in range(2):
            for p in params:
                p.grad = p.detach() * (t + 1)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for packed, at_once, one_by_one in zip(*ends, strict=True):
        assert_close(packed, at_once, rtol=0, atol=0)
        assert_close(packed, one_by_one, rtol=0, atol=0)


def test_explain_says_the_rule_and_who_steps_what_and_why():
    """One line per backend and kind of tensor: steps, could, or refuses with the reason; nothing changes."""
    params = [
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    ]
    optimizer = RMSprop(params, dialect="textbook", learning_rate=0.5)
    text = optimizer.explain()
    assert "Parameter group 0, dialect textbook, backend 'auto'" in text
    assert "[9] p ← p − 0.5·u" in text
    assert "2 float32 tensors on cpu" in text
    assert "eager: steps them" in text.split("complex64 tensor")[1]
    assert "cpu: refuses, the parameters are torch.complex64" in text
    assert len(optimizer.state) == 0
    named = RMSprop(params[:1], backend="eager").explain()
    assert "eager: steps them" in named


def test_a_missing_kernel_is_a_reason_with_its_remedy(monkeypatch, tmp_path):
    """Without the compiled library everything steps in eager, and explain says what is missing and how to get it."""
    from rmsprop.kernels import native

    real = native.load
    monkeypatch.setattr(native, "load", lambda library=None: real(library or tmp_path / "none.so"))
    p = nn.Parameter(torch.ones(2))
    optimizer = RMSprop([p], lr=0.1)
    text = optimizer.explain()
    assert "cpu: refuses, the compiled kernel is missing" in text
    assert "C++17 compiler" in text
    assert "eager: steps them" in text
    p.grad = torch.ones(2)
    optimizer.step()
    assert_close(p.detach(), torch.zeros(2), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="the compiled kernel is missing"):
        RMSprop([p], backend="cpu")
