"""torch's own optimizer database: the inputs it tries on torch.optim.RMSprop, and the errors it expects."""

import warnings

import pytest
import torch

from rmsprop import RMSprop

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    common = pytest.importorskip(
        "torch.testing._internal.common_optimizers", reason="this torch ships no optimizer database"
    )

INFO = next(info for info in common.optim_db if info.optim_cls is torch.optim.RMSprop)
INPUTS = INFO.optim_inputs_func(device="cpu")
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


def clone(settings):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("schedule", [None, *range(len(INFO.scheduler_inputs[0]))])
@pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: entry.desc)
def test_every_input_gives_torchs_run(entry, schedule, layout):
    """The database's settings and schedulers, in three layouts, give torch's parameters."""
    shape = (2, 3, 4, 5)

    def lay(x):
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return x.transpose(0, 3) if layout == "transposed" else x

    runs = []
    for cls in (RMSprop, torch.optim.RMSprop):
        generator = torch.Generator().manual_seed(3)
        p = torch.nn.Parameter(lay(torch.randn(shape, generator=generator, dtype=torch.float64)))
        optimizer = cls([p], **clone(entry.kwargs))
        plan = None if schedule is None else INFO.scheduler_inputs[0][schedule](optimizer)
        for _ in range(15):
            p.grad = lay(torch.randn(shape, generator=generator, dtype=torch.float64))
            optimizer.step()
            if plan is not None:
                plan.step(*([1.0] if isinstance(plan, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        runs.append(p.detach())
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("entry", ERRORS, ids=lambda entry: entry.optimizer_error_input.desc)
def test_every_error_that_torch_expects_is_raised(entry):
    """The same errors; duplicates, of which torch only warns, are refused with an error."""
    wanted = ValueError if entry.error_type is UserWarning else entry.error_type
    given = entry.optimizer_error_input
    if entry.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(wanted, match=entry.error_regex):
            RMSprop(given.params if given.params is not None else [torch.ones(1)], **given.kwargs)
    else:
        optimizer = RMSprop(given.params, **given.kwargs)
        with pytest.raises(wanted, match=entry.error_regex):
            optimizer.step()


@pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: entry.desc)
def test_gradients_check_against_finite_differences(entry):
    """A recorded step passes gradcheck, as the database's differentiable flag asks."""
    p = torch.rand(4, dtype=torch.float64, requires_grad=True)
    grad = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def end(p, grad):
        held = p.clone()
        held.grad = grad
        optimizer = RMSprop([held], differentiable=True, **clone(entry.kwargs))
        # a state that runs already: the first centered variance has a kink
        optimizer.state[held] = {
            "step": torch.tensor(5.0),
            "square_avg": torch.full((4,), 2.0, dtype=torch.float64),
            "grad_avg": torch.full((4,), 0.1, dtype=torch.float64),
            "momentum_buffer": torch.full((4,), 0.2, dtype=torch.float64),
        }
        optimizer.step()
        return held

    assert torch.autograd.gradcheck(end, (p, grad))
