"""We test the tests: each deliberate mistake in the eager body must be caught by comparing with the reference."""

import inspect

import pytest
import torch
from cases import CASES, within
from runs import Run

from rmsprop import RMSprop, kernels
from rmsprop.kernels import Backend, eager

# (name of the mistake, what the body says, what it says instead)
MISTAKES = [
    ("eps outside becomes inside", "do.add_(d, eps)", "d = do.sqrt(do.add(w if w is v else do.mul(w, w), eps))"),
    ("eps forgotten outside", "        do.add_(d, eps)\n", "        pass\n"),
    ("eps in the root forgotten", "d = do.add(w, eps)", "d = do.add(w, 0.0)"),
    ("floor adds", "do.clamp_min_(d, eps)", "do.add_(d, eps)"),
    ("alpha for 1-alpha", "value=1 - alpha)", "value=alpha)"),
    ("lr outside becomes inside", "(lr, 1.0) if rule.lr_in_buffer else (1.0, lr)", "(lr, 1.0)"),
    ("lr inside becomes outside", "(lr, 1.0) if rule.lr_in_buffer else (1.0, lr)", "(1.0, lr)"),
    (
        "nesterov ignored",
        "        if rule.nesterov:\n            do.addcdiv_",
        "        if False:\n            do.addcdiv_",
    ),
    ("momentum squared in nesterov", "alpha=-out * mu)", "alpha=-out * mu * mu)"),
    ("momentum not applied", "        do.mul_(b, mu)\n        do.addcdiv_", "        do.addcdiv_"),
    ("ascent as descent", "if rule.maximize:\n        g = do.neg(g)", "if False:\n        g = do.neg(g)"),
    ("maximize after decay", "alpha=wd)", "alpha=-wd if rule.maximize else wd)"),
    ("l2 for decoupled", 'rule.weight_decay_mode == "l2"', "True"),
    ("decoupled without lr", "1 - lr * wd", "1 - wd"),
    ("gradient edited", "g = do.add(g, p, alpha=wd)", "do.add_(g, p, alpha=wd)"),
    ("gradient negated in place", "g = do.neg(g)", "do.mul_(g, -1)"),
    ("not centered", "w = do.addcmul(vh, mh, mh, value=-1)", "w = do.addcmul(vh, mh, mh, value=0)"),
    ("mean of the wrong weight", "do.lerp_(m, entering, 1 - alpha)", "do.lerp_(m, entering, alpha)"),
    ("bias of the mean forgotten", "mh = do.div(m, c[0] if one else c) if rule.centered else m", "mh = m"),
    ("bias counted from the old step", "alpha ** t.item()", "alpha ** (t.item() - 1)"),
    ("corrected average kept", "vh = do.div(v, c[0] if one else c)", "do.mul_(v, 1.0000001); vh = v"),
    ("0/0 left to be NaN", "di.masked_fill_((gi == 0) & (di == 0), 1)", "pass"),
    ("eps taken for 0", "if _vanishes(eps, dtype):", "if True:\n        eps = 0\n        d = do.mul(d, 0)"),
    ("the step not counted", '_count(bucket.slots["step"])', "pass"),
    (
        "only the first part stepped",
        "advance(rule, hyper, part.as_real())",
        "advance(rule, hyper, part.as_real()); break",
    ),
]


def caught() -> bool:
    """Whether any case, in either way of stepping, is beyond its budget, or a zero gradient moves anything."""
    for case in CASES:
        for foreach in (None, False):
            for found in Run(case, torch.float64, foreach=foreach, backend="eager").steps((0.01, 0.004)):
                try:
                    within(found)
                except AssertionError:
                    return True
    still = torch.nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    RMSprop([still], eps=0.0, backend="eager").step()
    return not torch.equal(still, torch.ones(3))


def test_the_body_as_it_stands_is_not_caught():
    """The comparison passes what is right, so a catch below means something."""
    assert not caught()


@pytest.mark.parametrize(("name", "says", "instead"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_each_mistake_is_caught(name, says, instead, monkeypatch):
    """The body is compiled anew with one mistake in it, and the table of cases refuses it."""
    source = inspect.getsource(eager)
    assert says in source, f"{name}: the body no longer says {says!r}; restate the mistake"
    wrong: dict[str, object] = {"__name__": "wrong"}
    exec(compile(source.replace(says, instead), "wrong", "exec"), wrong)
    broken = Backend("eager", eager.refuse, wrong["step"])
    monkeypatch.setattr(kernels, "BACKENDS", (broken,))
    try:
        found = caught()
    except AssertionError:  # NaN elsewhere, a gradient edited
        found = True
    except (RuntimeError, TypeError, ValueError):
        found = True
    assert found, f"nothing noticed: {name}"
