"""What a process has set for all of torch, such as a default device or dtype or inference mode, changes no number."""

import copy
import pickle
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from cases import mostly_long
from torch import nn

from rmsprop import RMSprop, checkpoint
from rmsprop.conversion import convert
from rmsprop.conversion.file import prepare, write
from rmsprop.demo.data import load_digits
from rmsprop.demo.training import make_network
from rmsprop.diagnose.effective_lr import Recorder, effective_lr
from rmsprop.race import landscapes


@contextmanager
def _default_device():
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "meta device": lambda: torch.device("meta"),
    "default device": _default_device,
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}

# Settings that lead through each of the library's bodies of the formula, and around it.
WAYS = {
    "plan": dict(momentum=0.9, centered=True),
    "eager": dict(momentum=0.9, centered=True, backend="eager"),
    "foreach": dict(momentum=0.9, nesterov=True, foreach=True),
    "one by one": dict(bias_correction=True, foreach=False),
    "capturable": dict(bias_correction=True, centered=True, capturable=True, backend="eager"),
    "differentiable": dict(bias_correction=True, centered=True, differentiable=True),
    "clip": dict(clip_global_norm=0.1, clip_norm=0.5, clip_value=0.2, clip_weights=0.5, weight_decay=0.1),
    "max_update": dict(max_update=2.0, centered=True, momentum=0.9, backend="eager"),
    "lazy": dict(sparse="lazy", momentum=0.9),
    "dense": dict(sparse="dense", momentum=0.9),
    "stochastic": dict(rounding="stochastic", compensation=True, backend="eager"),
    "stochastic plan": dict(rounding="stochastic", bias_correction=True),
    "skip": dict(nonfinite="skip", backend="eager"),
    "skip plan": dict(nonfinite="skip"),
    "amp": dict(amp_in_step=True, capturable=True),
    "tensor lr": dict(lr=torch.tensor(0.01)),
    "keras": dict(dialect="keras3", learning_rate=0.01),
}


def _settings(way):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in WAYS[way].items()}


def _tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in ((5, 4), (7,), (3, 2))]


def _run(way, mode):
    """Values of everything that a run of three steps, a load and two more leaves behind, made inside the mode."""
    dtype = torch.bfloat16 if way.startswith("stochastic") else torch.float32
    params = [nn.Parameter(x) for x in _tensors(dtype)]
    if way == "differentiable":
        params = [p.detach().clone() for p in params]
    if way == "eager":
        params.append(nn.Parameter(torch.complex(torch.ones(3), torch.arange(3.0))))
    grads = [[torch.full_like(p, 0.3 * (i + 1)).detach() + p.detach() / 3 for p in params] for i in range(5)]
    if way == "skip":
        grads[1][0][0, 0] = torch.inf
    if way in ("lazy", "dense"):
        for row in grads:
            row[0] = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), row[0][:3], (5, 4), check_invariants=True)
    found, scale = torch.zeros(()), torch.tensor(4.0)
    optimizer = None
    with mode():
        optimizer = RMSprop([(f"p{i}", p) for i, p in enumerate(params)], **_settings(way))
        recorder = Recorder(optimizer)
        for i, row in enumerate(grads):
            if i == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for p, g in zip(params, row, strict=True):
                p.grad = g.clone()
            if way == "amp":
                optimizer.found_inf, optimizer.grad_scale = found, scale
            optimizer.step()
            recorder.record()
        texts = [optimizer.explain(), repr(optimizer), *map(str, optimizer.lint())]
        rates = effective_lr(optimizer)
    state = [optimizer.state[p] for p in params]
    return [*params, *rates.values()], state, [*texts, *map(str, recorder.rows), str(optimizer.skipped)]


def _same(one, other):
    assert one.device.type == "cpu"
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert torch.equal(one, other)


@pytest.mark.parametrize("way", mostly_long(WAYS, lambda i, _: i % 3 == 0))
def test_a_run_under_a_global_mode_is_bitwise_the_run_without(way):
    """Parameters, state, what is reported of them: nothing follows a default of the process."""
    params, state, texts = _run(way, ExitStack)
    for mode in MODES.values():
        params_there, state_there, texts_there = _run(way, mode)
        for one, other in zip(params_there, params, strict=True):
            _same(one, other)
        for entry, other in zip(state_there, state, strict=True):
            assert entry.keys() == other.keys()
            for name in entry:
                assert not entry[name].is_inference(), f"{name} cannot be written once inference mode is over"
                _same(entry[name], other[name])
        assert texts_there == texts


@pytest.mark.parametrize("mode", MODES)
def test_state_made_under_a_global_mode_serves_after_it(mode):
    """A step, a copy and a pickle made inside a mode go on outside it, on every backend."""
    for backend in ("auto", "eager"):
        ends = []
        for context in (ExitStack, MODES[mode]):
            params = [nn.Parameter(x) for x in _tensors()]
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            with context():
                optimizer = RMSprop(params, momentum=0.9, centered=True, backend=backend)
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            ends.append([*params, *(x for p in params for x in optimizer.state[p].values())])
        for one, other in zip(*ends, strict=True):
            _same(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_shared_memory_and_files_under_a_global_mode_hold_the_same(mode, tmp_path):
    """share_memory, checkpoint.save and load, torch.save and convert make what they make without."""
    ends = []
    for i, context in enumerate((ExitStack, MODES[mode])):
        params = [nn.Parameter(x) for x in _tensors()]
        for p in params:
            p.share_memory_()
        with context():
            optimizer = RMSprop(params, momentum=0.9, square_avg_init=1.0, bias_correction=True)
            optimizer.share_memory()
            for p in params:
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()
            checkpoint.save(tmp_path / f"{i}.safetensors", optimizer=optimizer, step=1)
            torch.save({"optimizer": optimizer.state_dict()}, tmp_path / f"{i}.pt")
            again = RMSprop(
                [nn.Parameter(x) for x in _tensors()], momentum=0.9, square_avg_init=1.0, bias_correction=True
            )
            checkpoint.load(tmp_path / f"{i}.safetensors", optimizer=again)
            parts = checkpoint.load(tmp_path / f"{i}.safetensors")
            write(prepare(tmp_path / f"{i}.pt", "textbook"), tmp_path / f"{i}.out.pt")
            entry, _ = convert(
                optimizer.state[params[0]], "torch", {"dialect": "optax", "bias_correction": True}, lr=0.5
            )
            pickled = pickle.loads(pickle.dumps(optimizer))
        out = torch.load(tmp_path / f"{i}.out.pt", weights_only=True)
        stored = [x for entry in parts["optimizer"]["state"].values() for x in entry.values()]
        converted = [x for entry in out["optimizer"]["state"].values() for x in entry.values()]
        states = [x for o in (optimizer, again, pickled) for entry in o.state.values() for x in entry.values()]
        ends.append([*params, *states, *stored, *converted, *entry.values()])
    for one, other in zip(*ends, strict=True):
        _same(one, other)


@pytest.mark.parametrize("mode", ["meta device", "default device", "float64"])
def test_races_and_networks_do_not_follow_defaults(mode):
    """What the library itself trains on is on the CPU, in its own dtype."""
    data = load_digits(seed=0)
    with MODES[mode]():
        (run,) = landscapes.race("noisy-ravine", ["rmsprop"], steps=3)
        network = make_network(data, seed=1)
    assert np.isfinite(run.points).all()
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("cpu", torch.float32)}
