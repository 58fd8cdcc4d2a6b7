"""The equation in NumPy float64: the judge of every backend. Nothing in production imports it.

Three steps worked by hand, for the textbook rule (eps inside, no momentum) with lr = 1, alpha = 1/2,
eps = 1, from p = 1, with gradients 2, 0, −4:

    t   g   v ← v/2 + g²/2      d ← √(v + 1)   u ← g/d    p ← p − u
    1   2   0/2 + 4/2   = 2     √3             2/√3       1 − 2/√3              = −0.1547005383792517
    2   0   2/2 + 0/2   = 1     √2             0          1 − 2/√3              = −0.1547005383792517
    3  −4   1/2 + 16/2  = 17/2  √(19/2)        −4/√9.5    1 − 2/√3 + 4/√9.5     =  1.1430708306668487

>>> from rmsprop.spec import Hyper, Rule
>>> rule, hyper = Rule(eps_mode="inside"), Hyper(lr=1.0, alpha=0.5, eps=1.0)
>>> p = np.array([1.0])
>>> state = start(rule, p)
>>> for g in (2.0, 0.0, -4.0):
...     p, state = step(rule, hyper, p, np.array([g]), state)
...     print(f"{p[0]:.12f}  v = {state['square_avg'][0]}")
-0.154700538379  v = 2.0
-0.154700538379  v = 1.0
1.143070830667  v = 8.5
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmsprop.spec import Hyper, Rule

Array = NDArray[np.float64]
State = dict[str, Any]


def start(rule: Rule, p: Array) -> State:
    """The state before the first step: exactly the slots of the rule.

    Shapes: every slot but `step` has the shape of p.
    """
    fresh = {"step": 0, "square_avg": np.full(p.shape, rule.v_init, dtype=np.float64)}
    return {slot: fresh.get(slot, np.zeros(p.shape)) for slot in rule.slots()}


def step(rule: Rule, hyper: Hyper, p: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step of the equation; returns the new parameter and the new state, and edits neither argument.

    Equation: spec.py, lines [1]-[9].
    Shapes:   p, g and each slot share one shape. Complex numbers are pairs of independent reals: pass a view.
    """
    lr, alpha, eps, momentum, wd = (
        float(x) for x in (hyper.lr, hyper.alpha, hyper.eps, hyper.momentum, hyper.weight_decay)
    )
    p, g, v = (np.asarray(x, dtype=np.float64) for x in (p, g, state["square_avg"]))
    t = int(state["step"]) + 1
    new: State = {"step": t}
    with np.errstate(all="ignore"):  # a NaN or inf gradient is the user's fact: it propagates
        # [1] decay
        if rule.maximize:
            g = -g
        if wd != 0:
            if rule.weight_decay_mode == "l2":
                g = g + wd * p
            elif rule.weight_decay_mode == "l1":
                g = g + wd * np.sign(p)
            elif rule.weight_decay_mode == "decoupled":
                p = p - lr * wd * p
            else:
                p = p - (lr * lr / hyper.max_lr if hyper.max_lr else lr) * wd * p
        # [2] second moment
        new["square_avg"] = v = alpha * v + (1 - alpha) * g * g
        # [3] first moment
        if rule.centered:
            m = alpha * np.asarray(state["grad_avg"], dtype=np.float64) + (1 - alpha) * g
            new["grad_avg"] = m
        # [4] bias
        c = 1 - alpha**t if rule.bias_correction else 1.0
        # [5] variance
        w = np.maximum(v / c - (m / c) ** 2, 0) if rule.centered else v / c
        # [6] denominator
        if rule.eps_mode == "outside":
            d = np.sqrt(w) + eps
        elif rule.eps_mode == "inside":
            d = np.sqrt(w + eps)
        elif rule.eps_mode == "both":
            d = np.sqrt(w + eps) + eps
        else:
            d = np.maximum(np.sqrt(w), eps)
        # [7] direction
        u = np.where((g == 0) & (d == 0), 0.0, g / d)
        if rule.momentum:
            # [8] momentum
            if rule.lr_in_buffer:
                u = lr * u
            b = momentum * np.asarray(state["momentum_buffer"], dtype=np.float64) + u
            new["momentum_buffer"] = b
            u = u + momentum * b if rule.nesterov else b
        # [9] parameter
        p = p - (u if rule.momentum and rule.lr_in_buffer else lr * u)
    return p, new
