"""Properties that hold for every rule, searched by Hypothesis."""

import copy

import pytest
import torch
from cases import CASES, TABLE, as64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmsprop import RMSprop, functional

cases = st.sampled_from(TABLE)
seeds = st.integers(0, 2**31)
shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5)
relaxed = settings(max_examples=60, deadline=None)


def build(case, start, **options):
    """Parameters with those values, and their optimizer."""
    params = [nn.Parameter(value.clone()) for value in start]
    return params, RMSprop(params, **{**case.settings(), **options})


def draw(shapes, seed, dtype=torch.float64):
    """Random values of those shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def run(params, optimizer, gradients):
    """One step for each list of gradients."""
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


@relaxed
@given(cases, shapes, seeds)
def test_running_twice_is_bitwise_the_same(case, shapes, seed):
    """Same start, same gradients, same bits."""
    start, gradients = draw(shapes, seed), [draw(shapes, seed + i) for i in (1, 2, 3)]
    ends = []
    for _ in range(2):
        params, optimizer = build(case, start)
        run(params, optimizer, gradients)
        ends.append(values(params))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@relaxed
@given(cases, shapes, seeds, st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(case, shapes, seed, random):
    """Permuting the parameters permutes the result, bitwise."""
    start, gradients = draw(shapes, seed), [draw(shapes, seed + i) for i in (1, 2)]
    order = list(range(len(shapes)))
    random.shuffle(order)
    params, optimizer = build(case, start)
    run(params, optimizer, gradients)
    shuffled, other = build(case, [start[i] for i in order])
    run(shuffled, other, [[step[i] for i in order] for step in gradients])
    assert all(torch.equal(shuffled[place], params[i]) for place, i in enumerate(order))


@relaxed
@given(cases, st.integers(1, 70), seeds, st.randoms(use_true_random=False))
def test_the_order_of_elements_does_not_matter(case, size, seed, random):
    """RMSprop is element-wise: permuting a tensor's elements permutes the result, bitwise."""
    (start,), gradients = draw([(size,)], seed), [draw([(size,)], seed + i) for i in (1, 2)]
    order = list(range(size))
    random.shuffle(order)
    params, optimizer = build(case, [start])
    run(params, optimizer, gradients)
    shuffled, other = build(case, [start[order]])
    run(shuffled, other, [[step[0][order]] for step in gradients])
    assert torch.allclose(shuffled[0], params[0][order], rtol=1e-15, atol=1e-15)


@relaxed
@given(cases, shapes, seeds)
def test_flipping_every_sign_flips_the_path(case, shapes, seed):
    """(p, g) → (−p, −g) mirrors the run, bitwise."""
    start, gradients = draw(shapes, seed), [draw(shapes, seed + i) for i in (1, 2, 3)]
    params, optimizer = build(case, start)
    run(params, optimizer, gradients)
    mirrored, other = build(case, [-x for x in start])
    run(mirrored, other, [[-g for g in step] for step in gradients])
    assert all(torch.equal(-a, b) for a, b in zip(params, mirrored, strict=True))


@relaxed
@given(cases, shapes, seeds, st.integers(-20, 20))
def test_rescaled_gradients_take_the_same_path_at_eps_0(case, shapes, seed, power):
    """At eps = 0 and v from 0, gradients 2ᵏ times as large give the same run, bitwise (no l2, which adds p)."""
    options = dict(eps=0.0, square_avg_init=0.0, bias_correction=case.rule.bias_correction)
    if case.rule.weight_decay_mode == "l2":
        options["weight_decay"] = 0.0
    if case.rule.centered and case.rule.bias_correction:
        options["bias_correction"] = False  # its first variance is 0: g/0
    start, gradients = draw(shapes, seed), [draw(shapes, seed + i) for i in (1, 2, 3)]
    params, optimizer = build(case, start, **options)
    run(params, optimizer, gradients)
    scaled, other = build(case, start, **options)
    run(scaled, other, [[g * 2.0**power for g in step] for step in gradients])
    assert all(torch.equal(a, b) for a, b in zip(params, scaled, strict=True))


@relaxed
@given(cases, shapes, seeds, st.integers(0, 5))
def test_splitting_into_groups_changes_nothing(case, shapes, seed, cut):
    """One group or two, foreach or not: the same run, bitwise."""
    start, gradients = draw(shapes, seed), [draw(shapes, seed + i) for i in (1, 2)]
    params, optimizer = build(case, start)
    run(params, optimizer, gradients)
    parts = [nn.Parameter(value.clone()) for value in start]
    groups = [{"params": part} for part in (parts[:cut], parts[cut:]) if part]
    run(parts, RMSprop(groups, **case.settings()), gradients)
    assert all(torch.equal(a, b) for a, b in zip(params, parts, strict=True))


@relaxed
@given(cases, shapes, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_saving_and_resuming_is_bitwise(case, shapes, seed, dtype):
    """Two steps, a state dict, and two more equal four."""
    start, gradients = draw(shapes, seed, dtype), [draw(shapes, seed + i, dtype) for i in (1, 2, 3, 4)]
    params, optimizer = build(case, start)
    run(params, optimizer, gradients)
    first, saver = build(case, start)
    run(first, saver, gradients[:2])
    saved = copy.deepcopy(saver.state_dict())
    second = [nn.Parameter(value) for value in values(first)]
    loader = RMSprop(second)
    loader.load_state_dict(saved)
    run(second, loader, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, second, strict=True))


@relaxed
@given(cases, shapes, seeds)
def test_the_functional_form_is_the_optimizers_step(case, shapes, seed):
    """Given explicit state, the function does what step() does, bitwise, and edits no gradient."""
    start, gradients = draw(shapes, seed), draw(shapes, seed + 1)
    params, optimizer = build(case, start)
    run(params, optimizer, [gradients])
    rule, hyper = case.rule, case.hyper
    tensors = values(start)
    kept = [g.clone() for g in gradients]
    square_avgs = [torch.full_like(x, rule.square_avg_init) for x in tensors]
    grad_avgs = [torch.zeros_like(x) for x in tensors]
    buffers = [torch.zeros_like(x) for x in tensors]
    steps = [torch.tensor(0.0) for _ in tensors]
    functional.rmsprop(
        tensors,
        gradients,
        square_avgs,
        grad_avgs,
        buffers,
        steps,
        lr=hyper.lr,
        alpha=hyper.alpha,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        momentum=hyper.momentum,
        centered=rule.centered,
        maximize=rule.maximize,
        eps_mode=rule.eps_mode,
        lr_in_buffer=rule.lr_in_buffer,
        nesterov=rule.nesterov,
        bias_correction=rule.bias_correction,
        weight_decay_mode=rule.weight_decay_mode,
    )
    assert all(torch.equal(a, b) for a, b in zip(params, tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    for p, v in zip(params, square_avgs, strict=True):
        assert torch.equal(optimizer.state[p]["square_avg"], v)
    assert all(t == 1 for t in steps)


@pytest.mark.parametrize("name", ["rmsprop"])
def test_the_functional_form_has_torchs_name_and_order(name):
    """Arguments in the order of torch.optim.functional.rmsprop (torch 2.15), ours keyword-only behind them."""
    import inspect

    from torch.optim.rmsprop import rmsprop as theirs

    mine = list(inspect.signature(getattr(functional, name)).parameters)
    assert mine[: len(inspect.signature(theirs).parameters)] == list(inspect.signature(theirs).parameters)


def test_a_run_of_complex_numbers_is_two_runs_of_reals():
    """Real and imaginary parts do not meet."""
    for case in CASES[::2]:
        start = torch.randn(6, dtype=torch.complex128)
        grads = [torch.randn(6, dtype=torch.complex128) for _ in range(3)]
        params, optimizer = build(case, [start])
        run(params, optimizer, [[g] for g in grads])
        pairs, other = build(case, [torch.view_as_real(start)], backend="eager")  # as complex ones
        run(pairs, other, [[torch.view_as_real(g)] for g in grads])
        assert (as64(params[0]) == as64(pairs[0])).all()
