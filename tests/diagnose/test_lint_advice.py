"""What lint advises: followed, it makes the finding go away and brings no other."""

import random
import re

import pytest
import torch
from cases import mostly_long
from torch import nn

from rmsprop import RMSprop

SETTING = re.compile(r"\b(\w+)=('\w+'|True|False|None|[-+\d.e]+)")
GRID = {
    "lr": [1e-5, 1e-3, 1e-2, 0.3],
    "alpha": [0.5, 0.9, 0.99, 0.9999],
    "eps": [0.0, 1e-60, 1e-8, 1e-3, 1.0],
    "eps_mode": ["outside", "inside", "both", "floor"],
    "momentum": [0.0, 0.9],
    "nesterov": [False, True],
    "lr_in_buffer": [False, True],
    "centered": [False, False, True],
    "bias_correction": [False, True],
    "max_update": [None, None, 3.0],
    "maximize": [False, False, True],
    "dtype": [torch.float32, torch.float32, torch.float64, torch.bfloat16],
    "size": [0.01, 0.1, 3.0],
    "gradient": [1e-2, 1.0, 100.0],
    "taken": [0, 0, 1, 50],
    "run": [None, 1, 2, 5, 10, 30, 99, 100, 1000, 10**6],
    "spike": [False, False, True],
    "state_dtype": ["float32", "float32", "bfloat16", "float8"],
}


def draw(seed):
    """Settings and a run; centered with bias correction is an error of its own."""
    rng = random.Random(seed)
    case = {name: rng.choice(values) for name, values in GRID.items()}
    case["nesterov"] &= case["momentum"] > 0
    case["bias_correction"] &= not case["centered"]
    if case["spike"]:  # it shortens steps too
        case["dtype"] = torch.float32
    if case["dtype"] == torch.float64 or case["centered"]:  # centered steps from fewer bytes are noise, as lint finds
        case["state_dtype"] = "float32"
    return case


def optimizer_of(case):
    """An optimizer with a gradient, after some steps of noise that left the weights where they were."""
    words = dict(case)
    dtype, size, g, taken, spike = (words.pop(name) for name in ("dtype", "size", "gradient", "taken", "spike"))
    del words["run"]
    random_numbers = torch.Generator().manual_seed(0)
    p = nn.Parameter((size * torch.randn(20, 10, generator=random_numbers)).to(dtype))
    optimizer, weights = RMSprop([p], **words), p.detach().clone()
    for t in range(taken + 1):
        p.grad = (g * torch.randn(20, 10, generator=random_numbers) * (1e5 if spike and t == 40 else 1)).to(dtype)
        if t < taken:
            optimizer.step()
            p.data.copy_(weights)
    return optimizer


def followed(case, change):
    """The case with each alternative of an advice."""
    for part in re.split(",? or ", change):
        settings = {name: eval(value) for name, value in SETTING.findall(part)}
        if settings:
            yield {**case, **settings}
        elif re.search("float(32|64)", part):
            wide = {"dtype": torch.float64, "state_dtype": "float32"}
            yield {**case, **(wide if "float64" in part else {"dtype": torch.float32})}


@pytest.mark.parametrize("first", mostly_long(range(0, 400, 100), lambda i, _: i == 0))
def test_advice_that_is_followed_ends_the_finding_and_brings_no_other(first):
    """Every setting that an advice names, alone where it says `or`, together where it says `and` or `with`."""
    for seed in range(first, first + 100):
        case = draw(seed)
        findings = optimizer_of(case).lint(case["run"])
        before = {finding.name for finding in findings}
        for finding in findings:
            for changed in followed(case, finding.change):
                after = {other.name for other in optimizer_of(changed).lint(changed["run"])}
                if finding.name == "stuck":  # a spike hides what its absence shows
                    after &= {"stuck"}
                if finding.name == "state_range":  # v at its largest hides how far a spike went beyond it
                    after -= {"stuck"}
                elif case["gradient"] == 100.0:  # v at the end of the range of float8, sooner with a smaller alpha
                    after -= {"state_range"}
                assert after <= before - {finding.name}, (seed, str(finding), changed, after - before)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 10, 50, 100, 1000, 10**6])
@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.99, 0.9999])
def test_no_alpha_is_advised_that_the_run_is_too_short_for(steps, alpha):
    """alpha 0.9 remembers 10 steps; of a run of one step no alpha is advised."""
    (*findings,) = RMSprop([nn.Parameter(torch.ones(4, 4))], alpha=alpha, lr=1e-3).lint(steps=steps)
    for finding in findings:
        for value in re.findall(r"alpha=([\d.]+)", finding.change):
            assert 1 / (1 - float(value)) <= steps * (1 + 1e-9), str(finding)
            assert float(value) < alpha, str(finding)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.01), 1e300, 5e-324], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64], ids=str)
def test_no_advice_names_a_number_that_is_refused(lr, dtype):
    """Of any learning rate: what is advised can be given to RMSprop."""
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    for case in (
        {},
        {"momentum": 0.9},
        {"eps": 0.0},
        {"eps": 1e-60},
        {"alpha": 0.0},
        {"centered": True, "alpha": 0.1},
    ):
        for finding in RMSprop([p], **{"lr": lr, **case}).lint(steps=5):
            for changed in followed({"dtype": dtype, "lr": lr, **case}, finding.change):
                del changed["dtype"]
                RMSprop([nn.Parameter(torch.ones(4, 4, dtype=dtype))], **changed)
                assert changed["lr"] or not lr, str(finding)
