"""The plan steps only what the full step would have stepped alike: whatever is moved under it, both agree."""

# ruff: noqa: ARG001
import collections

import pytest
import torch
from torch import Tensor

from rmsprop import RMSprop
from rmsprop.kernels import native
from rmsprop.kernels.plan import Plan

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


class Wrapped(Tensor):
    """A subclass whose memory is not its value: an operator sees twice what is stored."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        wrapped: Wrapped = torch.Tensor._make_subclass(cls, inner)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def real(x):
            return x.inner * 2 if isinstance(x, Wrapped) else x

        args, kwargs = torch.utils._pytree.tree_map(real, (args, kwargs or {}))
        return func(*args, **kwargs)


class Overridden(dict):
    """A dict that answers otherwise than it stores."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return value * 2 if key == "square_avg" else value

    def get(self, key, default=None):
        return super().get(key, default) if key != "square_avg" else self[key]


def build(backend: str, planned: bool) -> tuple[RMSprop, list[torch.nn.Parameter]]:
    """Two groups of two parameters that have stepped three times, with a plan or without."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(4)]
    optimizer = RMSprop([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], backend=backend, momentum=0.9)
    for turn in range(3):
        gradients(params, turn)
        optimizer.step()
    assert optimizer._stepper.plan is not None
    if not planned:
        optimizer._stepper.plan = None
    return optimizer, params


def gradients(params: list[torch.nn.Parameter], turn: int) -> None:
    generator = torch.Generator().manual_seed(100 + turn)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def tie(o, ps):
    ps[1].data = ps[0].data


def tie_over_groups(o, ps):
    ps[3].data = ps[0].data


def overlap_shifted(o, ps):
    memory = torch.arange(16.0)
    ps[0].data, ps[3].data = memory[:12].view(3, 4), memory[4:].view(3, 4)


def gradient_of_another_parameter(o, ps):
    ps[2].grad = ps[0].data


def gradient_of_its_state(o, ps):
    ps[2].grad = o.state[ps[2]]["square_avg"]


def gradient_of_anothers_state(o, ps):
    ps[2].grad = o.state[ps[1]]["momentum_buffer"]


def gradient_shifted_into_another(o, ps):
    memory = torch.arange(16.0)
    ps[0].data, ps[3].grad = memory[:12].view(3, 4), memory[4:].view(3, 4)


def gradient_is_its_parameter(o, ps):
    ps[0].grad = ps[0].data


def one_gradient_for_two(o, ps):
    ps[0].grad = ps[3].grad


def gradient_negated(o, ps):
    ps[0].grad = torch._neg_view(ps[0].grad.clone())


def gradient_of_a_conjugate(o, ps):
    ps[0].grad = torch.complex(torch.zeros(3, 4), ps[0].grad).conj().imag


def gradient_in_a_subclass(o, ps):
    ps[0].grad = Wrapped(ps[0].grad)


def gradient_in_a_plain_subclass(o, ps):
    ps[0].grad = ps[0].grad.as_subclass(type("Marked", (Tensor,), {}))


def gradient_zero_without_memory(o, ps):
    ps[0].grad = torch._efficientzerotensor((3, 4))


def gradient_sparse(o, ps):
    ps[0].grad = ps[0].grad.to_sparse()


def gradient_transposed(o, ps):
    ps[0].grad = ps[0].grad.t().contiguous().t()


def gradient_expanded(o, ps):
    ps[0].grad = torch.ones(()).expand(3, 4)


def gradient_made_in_inference_mode(o, ps):
    with torch.inference_mode():
        ps[0].grad = torch.ones(3, 4)


def slot_negated(o, ps):
    o.state[ps[0]]["momentum_buffer"] = torch._neg_view(o.state[ps[0]]["momentum_buffer"])


def slot_in_a_subclass(o, ps):
    o.state[ps[0]]["square_avg"] = Wrapped(o.state[ps[0]]["square_avg"])


def slot_aliases_another(o, ps):
    o.state[ps[0]]["momentum_buffer"] = o.state[ps[3]]["momentum_buffer"]


def slot_is_its_parameter(o, ps):
    o.state[ps[0]]["momentum_buffer"] = ps[0].data


def slot_is_a_parameter(o, ps):
    own = o.state[ps[0]]
    own["square_avg"] = torch.nn.Parameter(own["square_avg"])


def slot_resized(o, ps):
    o.state[ps[0]]["square_avg"].resize_(2, 6)


def slot_of_other_dtype_in_place(o, ps):
    o.state[ps[0]]["square_avg"].data = torch.ones(3, 4, dtype=torch.float64)


def step_shared(o, ps):
    o.state[ps[0]]["step"] = o.state[ps[3]]["step"]


def step_as_a_number(o, ps):
    o.state[ps[0]]["step"] = 9


def step_of_int64(o, ps):
    o.state[ps[0]]["step"] = torch.tensor(9)


def compensation_put_by_hand(o, ps):
    o.state[ps[0]]["compensation"] = torch.zeros(3, 4)


def params_a_tuple(o, ps):
    o.param_groups[1]["params"] = tuple(ps[2:])


def params_a_user_list(o, ps):
    o.param_groups[1]["params"] = collections.UserList(ps[2:])


def params_with_something_else(o, ps):
    o.param_groups[1]["params"].append(None)


def params_moved_between_groups(o, ps):
    o.param_groups[1]["params"].insert(0, o.param_groups[0]["params"].pop())


def params_listed_twice(o, ps):
    o.param_groups[1]["params"][0] = ps[0]


def params_swapped(o, ps):
    own = o.param_groups[0]["params"]
    own[0], own[1] = own[1], own[0]


def entry_a_user_dict(o, ps):
    o.state[ps[0]] = collections.UserDict(o.state[ps[0]])


def entry_overridden(o, ps):
    o.state[ps[0]] = Overridden(o.state[ps[0]])


def entry_ordered(o, ps):
    o.state[ps[0]] = collections.OrderedDict(o.state[ps[0]])


def entry_of_another(o, ps):
    o.state[ps[0]], o.state[ps[1]] = o.state[ps[1]], o.state[ps[0]]


def entry_shared(o, ps):
    o.state[ps[0]] = o.state[ps[3]]


def state_a_plain_dict(o, ps):
    o.state = dict(o.state)


def state_in_another_order(o, ps):
    o.state = collections.defaultdict(dict, reversed(o.state.items()))


def state_a_user_dict(o, ps):
    o.state = collections.UserDict(o.state)


def setting_lost(o, ps):
    del o.param_groups[0]["eps"]


def setting_of_no_use(o, ps):
    o.param_groups[0]["sparse"] = "sometimes"


def alpha_a_flag(o, ps):
    o.param_groups[0]["alpha"] = False


def alpha_a_tensor(o, ps):
    o.param_groups[0]["alpha"] = torch.tensor(0.5)


def lr_a_tensor_of_whole_numbers(o, ps):
    o.param_groups[0]["lr"] = torch.tensor(1)


def lr_text(o, ps):
    o.param_groups[0]["lr"] = "0.1"


def lr_a_tensor_on_meta(o, ps):
    o.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")


def dialect_unknown(o, ps):
    o.param_groups[0]["dialect"] = "fortran"


def parameter_in_half(o, ps):
    ps[0].data, ps[0].grad = ps[0].data.half(), ps[0].grad.half()


def parameter_negated(o, ps):
    ps[0].data = torch._neg_view(ps[0].data)


def parameter_with_gaps(o, ps):
    ps[0].data = torch.randn(3, 8)[:, ::2].fill_(0.5)


def parameter_expanded(o, ps):
    ps[0].data = torch.ones(1, 4).expand(3, 4)


def everything_transposed(o, ps):
    ps[0].data, ps[0].grad = torch.ones(4, 3).t(), torch.ones(4, 3).t()
    for slot in ("square_avg", "momentum_buffer"):
        o.state[ps[0]][slot] = torch.ones(4, 3).t()


def a_parameter_that_never_had_a_gradient(o, ps):
    late = torch.nn.Parameter(torch.ones(2))
    late.grad = torch.ones(2)
    o.param_groups[0]["params"].append(late)


MOVES = [
    f for f in list(globals().values()) if getattr(f, "__code__", None) and f.__code__.co_varnames[:2] == ("o", "ps")
]


def outcome(move, backend: str, planned: bool) -> tuple[object, ...]:
    """What a step after the move did: its refusal, or the numbers; then those of a usual step."""
    optimizer, params = build(backend, planned)
    gradients(params, 3)
    move(optimizer, params)
    found: list[object] = []
    for turn in (4, 5):
        try:
            optimizer.step()
            found.append(None)
        except Exception as error:
            found.append((type(error), str(error)[:100]))
        found += [p.detach().double().resolve_neg().clone() for p in params]
        steps = [optimizer.state[p]["step"] for p in params]
        found.append([float(x) if isinstance(x, Tensor) else x for x in steps])
        gradients(params, turn)
    return tuple(found)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("move", MOVES, ids=lambda f: f.__name__)
def test_a_step_with_a_plan_is_the_step_without(move, backend) -> None:
    """The same numbers, bit by bit, or the same refusal with nothing changed, whatever was moved."""
    fast, full = (outcome(move, backend, planned) for planned in (True, False))
    for a, b in zip(fast, full, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def test_a_gradient_that_stays_while_a_parameter_comes_to_it_is_seen() -> None:
    """A gradient at the address of the step before is compared anew once a parameter has moved."""
    optimizer, params = build("auto", True)
    memory = torch.arange(12.0).view(3, 4)
    for p in params:
        p.grad = torch.ones(3, 4)
    params[1].grad = memory
    optimizer.step()
    params[0].data = memory  # the gradient stays where it was: now it is another parameter's memory
    plan = optimizer._stepper.plan
    assert plan is not None
    assert not plan.again(optimizer.backend, optimizer.param_groups, optimizer.state)


def test_writes_are_counted_before_they_are_made(monkeypatch) -> None:
    """An exception where autograd is told, such as a signal's, finds nothing written yet."""
    for size in (6, 200_000):
        for planned in (False, True):
            w = torch.nn.Parameter(torch.ones(size))
            optimizer = RMSprop([w], lr=0.01, nonfinite="raise" if planned else "propagate")
            for _ in range(3 if planned else 0):
                w.grad = torch.ones(size)
                optimizer.step()
            w.grad = torch.ones(size)
            value, version = w.detach().clone(), w._version

            def stop(_tensors: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(torch.autograd.graph, "increment_version", stop)
                try:
                    optimizer.step()
                except KeyboardInterrupt:
                    assert torch.equal(w, value)
                else:  # the plan counts in C, in the call that writes
                    assert w._version == version + 1


def test_a_plan_names_no_object() -> None:
    """It holds no tensor, entry, group or list, by whatever name."""
    optimizer, params = build("auto", True)
    plan = optimizer._stepper.plan
    assert isinstance(plan, Plan)
    own = {id(x) for p in params for x in (p, p.grad, optimizer.state[p], *optimizer.state[p].values())}
    own |= {id(x) for group in optimizer.param_groups for x in (group, group["params"])}
    own |= {id(optimizer.state), id(optimizer.param_groups)}
    seen: set[int] = set()
    todo: list[object] = [plan]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type | str | int | float | torch.dtype):
            continue
        seen.add(id(x))
        assert id(x) not in own
        if isinstance(x, dict):
            todo += [*x, *x.values()]
        elif isinstance(x, list | tuple | set):
            todo += x
        elif type(x).__module__.startswith("rmsprop"):
            todo += list(getattr(x, "__dict__", {}).values())
