"""What a process does to threads (their modes, a fork) changes no number and stops no step."""

import os
import textwrap

import alone
import pytest
import torch
from cases import mostly_long

from rmsprop.kernels import native

compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
SECONDS = 120


def _alone(script: str, timeout: int = SECONDS) -> str:
    """What a script prints in a process of its own; it is killed where it hangs."""
    done = alone.run(textwrap.dedent(script), timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@compiled
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor does not flush subnormal numbers")
@pytest.mark.parametrize("early", mostly_long([False, True], lambda i, _: i == 0), ids=["pool before", "pool after"])
def test_flushed_subnormal_numbers_do_not_follow_the_threads(early):
    """torch.set_flush_denormal holds for its thread; the kernel's threads compute as the one that called it."""
    said = _alone(f"""
        import torch
        from rmsprop import RMSprop

        def run(threads, planned):
            torch.set_num_threads(threads)
            p = torch.nn.Parameter(torch.full((1 << 18,), 1e-38))
            optimizer = RMSprop([p], lr=1e-3, momentum=0.5, eps=1.0, backend="cpu")
            state = {{"step": torch.tensor(0.0, dtype=torch.float64)}}
            state |= {{name: torch.full_like(p, 1.5e-38).detach() for name in ("square_avg", "momentum_buffer")}}
            optimizer.state[p] = state
            for _ in range(3 if planned else 1):
                p.grad = torch.zeros_like(p)
                optimizer.step()
            return [p.detach(), *state.values()]

        torch.set_num_threads(2)
        if not {early}:
            torch.ones(1 << 22).add_(1)
            run(2, True)
        for flush in (True, False):
            assert torch.set_flush_denormal(flush)
            for planned in (False, True):
                one, two = run(1, planned), run(2, planned)
                print(flush, planned, all(map(torch.equal, one, two)), float(two[3].max()) > 0)
        torch.set_flush_denormal(True)
        torch.set_num_threads(2)
        before = (torch.full((1 << 22,), 1e-38) * 0.5).count_nonzero()
        run(2, True)
        after = (torch.full((1 << 22,), 1e-38) * 0.5).count_nonzero()
        print("threads as before", bool(before == after))
        """)
    lines = said.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["True"] * 4
    assert lines[0].endswith("False"), "0.5 of a subnormal buffer is flushed where the caller says so"
    assert lines[2].endswith("True")
    assert lines[4] == "threads as before True"


FORKED = """
    import copy, os, signal, sys, tempfile, torch
    from torch import nn
    from rmsprop import RMSprop, checkpoint
    from rmsprop.functional import rmsprop as functional
    from rmsprop.diagnose.effective_lr import effective_lr

    LARGE = 1 << 18  # far above the kernel's grain and torch's
    torch.set_num_threads(2)
    torch.ones(1 << 22).add_(1)  # the parent's threads are there, and in no child
    folder = tempfile.mkdtemp()

    def made(settings, bad=False):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if "rounding" in settings else torch.float32
        params = [nn.Parameter(torch.randn(LARGE).to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]
        if settings.get("differentiable"):
            params = [p.detach() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        if bad:
            params[0].grad[-1] = torch.inf
        return params, RMSprop(params, lr=0.01, **settings)

    def steps(params, optimizer):
        for _ in range(3):
            optimizer.step()
        return [*params, *(x for p in params for x in optimizer.state[p].values())]

    def in_child(what, *given):
        # Whether a child's results are the parent's, which works on one thread; None where it hangs.
        there = os.path.join(folder, "result.pt")
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            try:
                found = what(*given)
                assert torch.get_num_threads() == 2
                torch.set_num_threads(1)
                torch.save([x.detach() for x in found], there)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            return f"signal {status & 127}" if status & 127 else "failed"
        torch.set_num_threads(1)
        own = [x.detach() for x in what(*given)]
        torch.set_num_threads(2)
        found = torch.load(there)
        return all(map(torch.equal, own, found)) and len(own) == len(found)
"""

# Settings that lead around the plan, or to none in a child's first step.
STEPS = (
    {},
    dict(backend="eager", momentum=0.9, centered=True),
    dict(nonfinite="skip"),
    dict(nonfinite="raise", backend="eager"),
    dict(clip_norm=0.5, clip_value=0.4, clip_weights=1.0),
    dict(clip_global_norm=0.5, nonfinite="skip"),
    dict(foreach=True, bias_correction=True),
    dict(rounding="stochastic", backend="eager"),
    dict(max_update=1.0, backend="eager"),
    dict(differentiable=True),
)


def _in_forked_children(script: str) -> None:
    said = _alone(textwrap.dedent(FORKED.replace("SECONDS", "60")) + textwrap.dedent(script), timeout=600)
    lines = said.splitlines()
    assert lines
    assert all(line.endswith(" True") for line in lines), said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("settings", [STEPS[1:6:4], pytest.param(STEPS, marks=pytest.mark.long)], ids=["two", "all"])
def test_every_step_is_taken_in_a_forked_child(settings):
    """First steps, and steps after a plan, guarded, clipped, in torch's operators: bitwise the parent's."""
    _in_forked_children(f"""
        for settings in {settings!r}:
            for bad in (False, True) if settings == dict(nonfinite="skip") else (False,):
                params, optimizer = made(settings, bad)
                print(settings, bad, "new", in_child(steps, params, optimizer), flush=True)
                optimizer.step()
                optimizer.step()
                print(settings, bad, "planned", in_child(steps, params, optimizer), flush=True)
        """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_all_that_works_on_state_works_in_a_forked_child():
    """Loads, files, the function, lint and rates wait for no thread that is not there."""
    _in_forked_children("""
        params, optimizer = made(dict(momentum=0.9))
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        path = os.path.join(folder, "run.safetensors")

        def loaded():
            optimizer.load_state_dict(saved)
            return [x for p in params for x in optimizer.state[p].values()]

        def filed():
            checkpoint.save(path, optimizer=optimizer)
            checkpoint.load(path, optimizer=optimizer)
            return loaded()

        def rates():
            optimizer.lint()
            return list(effective_lr(optimizer).values())

        p, v = torch.ones(LARGE), torch.zeros(LARGE)

        def called():
            numbers = dict(lr=0.1, alpha=0.9, eps=1.0, weight_decay=0.0, momentum=0.0, centered=False)
            functional([p], [params[0].grad], [v], [], [], [torch.tensor(0.0)], backend="eager", **numbers)
            return [p, v]

        for what in (loaded, filed, rates, called):
            print(what.__name__, in_child(what), flush=True)
        """)
