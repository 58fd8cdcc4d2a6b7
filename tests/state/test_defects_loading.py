"""The defects of torch.optim.RMSprop's loading, as it has them and as they are here.

D8 state cast to the parameter's dtype; D9 state of another parameter; D10 settings replaced in silence; D12 another
optimizer's state taken; D16 a getter of distributed checkpoints that steps the optimizer.
"""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from rmsprop import RMSprop


def stepped(cls, params, **settings):
    """An optimizer that took one step, with the gradient 1 in every element."""
    optimizer = cls(params, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def named(order="ab"):
    """Two named parameters of one shape."""
    return [(name, nn.Parameter(torch.ones(2))) for name in order]


def test_d08_state_keeps_its_dtype():
    """float32 averages loaded into a bfloat16 model: torch rounds them to 8 bits, here they stay."""
    averages = torch.full((3,), 1 / 3)
    saved = stepped(torch.optim.RMSprop, [nn.Parameter(torch.ones(3))]).state_dict()
    saved["state"][0]["square_avg"] = averages
    half = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    torchs, ours = torch.optim.RMSprop(half), RMSprop(half)
    torchs.load_state_dict(saved)
    ours.load_state_dict(saved)
    assert torchs.state[half[0]]["square_avg"].dtype == torch.bfloat16
    assert ours.state[half[0]]["square_avg"].dtype == torch.float32
    assert torch.equal(ours.state[half[0]]["square_avg"], averages)


def test_d09_state_goes_to_the_parameter_of_its_name():
    """The same parameters in another order: torch swaps their states and then their names; here both are right."""
    saved = stepped(torch.optim.RMSprop, named("ab")).state_dict()
    for key, value in ((0, 1.0), (1, 100.0)):
        saved["state"][key]["square_avg"].fill_(value)
    found = []
    for cls in (torch.optim.RMSprop, RMSprop):
        params = dict(named("ba"))
        optimizer = cls(params.items())
        optimizer.load_state_dict(saved)
        states = {name: optimizer.state[p]["square_avg"][0].item() for name, p in params.items()}
        found.append((states, optimizer.param_groups[0]["param_names"]))
    assert found[0] == ({"b": 1.0, "a": 100.0}, ["a", "b"])
    assert found[1] == ({"b": 100.0, "a": 1.0}, ["b", "a"])


def test_d10_settings_are_not_replaced_in_silence():
    """An old checkpoint into RMSprop(momentum=.9, lr=5e-5): torch drops both; here it is said, and can be chosen."""
    saved = stepped(torch.optim.RMSprop, named()).state_dict()
    wanted = dict(momentum=0.9, lr=5e-5)
    torchs = torch.optim.RMSprop(named(), **wanted)
    torchs.load_state_dict(saved)
    assert (torchs.param_groups[0]["momentum"], torchs.param_groups[0]["lr"]) == (0, 0.01)
    with pytest.warns(UserWarning, match=r"replaces lr=5e-05 by 0.01, momentum=0.9 by 0.0, as torch does: give hpa"):
        RMSprop(named(), **wanted).load_state_dict(saved)
    ours = RMSprop(named(), **wanted)
    report = ours.load_state_dict(saved, hparams="keep")
    assert (ours.param_groups[0]["momentum"], ours.param_groups[0]["lr"]) == (0.9, 5e-5)
    assert str(report).splitlines()[1:] == [
        "group 0: lr=5e-05 here, 0.01 there: this optimizer's is kept",
        "group 0: momentum=0.9 here, 0.0 there: this optimizer's is kept",
    ]
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    ours.step()
    ours = RMSprop(named(), **wanted)
    ours.load_state_dict(saved, hparams="load")
    assert (ours.param_groups[0]["momentum"], ours.param_groups[0]["lr"]) == (0, 0.01)


@pytest.mark.parametrize(
    ("cls", "holds"),
    [
        (torch.optim.Adam, "step, exp_avg, exp_avg_sq and lacks square_avg, as torch.optim.Adam's does"),
        (torch.optim.AdamW, "step, exp_avg, exp_avg_sq and lacks square_avg, as torch.optim.AdamW's does"),
        (torch.optim.NAdam, "as torch.optim.NAdam's does"),
        (torch.optim.Adamax, "as torch.optim.Adamax's does"),
        (torch.optim.Adagrad, "step, sum and lacks square_avg, as torch.optim.Adagrad's does"),
        (torch.optim.Adadelta, "step, square_avg, acc_delta, as torch.optim.Adadelta's does"),
        (torch.optim.Rprop, "as torch.optim.Rprop's does"),
        (torch.optim.ASGD, "as torch.optim.ASGD's does"),
        (torch.optim.SGD, "momentum_buffer and lacks square_avg, as torch.optim.SGD's does"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_d12_another_optimizers_state_is_refused(cls, holds, strict):
    """torch takes it and fails at the next step; here a sentence says what carries over, and nothing changes."""
    settings = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    saved = stepped(cls, named(), **settings).state_dict()
    if cls is torch.optim.Adam:
        torchs = torch.optim.RMSprop(named())
        torchs.load_state_dict(saved)
        for p in torchs.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(KeyError, match=r"alpha|square_avg"):
            torchs.step()
    ours = stepped(RMSprop, named())
    before = repr(ours.state_dict())
    with pytest.raises(
        ValueError,
        match=rf"not an RMSprop's: the state of parameter 0 holds .*{holds}; (`rmsprop|nothing)",
    ):
        ours.load_state_dict(saved, strict=strict)
    assert repr(ours.state_dict()) == before


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adadelta])
def test_d12_also_before_it_has_stepped(cls):
    """Without state, the settings tell."""
    fresh = cls(named()).state_dict()
    fresh["state"] = {}
    with pytest.raises(
        ValueError,
        match=f"group 0 holds .*, as torch.optim.{cls.__name__}'s does; it has no state, so a new optimizer",
    ):
        RMSprop(named()).load_state_dict(fresh)


SETTINGS = {
    "plain": {},
    "weight-decay": {"weight_decay": 0.5},
    "eps-0": {"eps": 0.0, "weight_decay": 0.5},
    "centered": {"centered": True, "momentum": 0.9},
}
OURS = {
    "from-one": {"square_avg_init": 1.0, "centered": True, "momentum": 0.9},
    "lr-in-buffer": {"dialect": "tensorflow1", "lr": 0.01, "momentum": 0.9},
    "decoupled": {"weight_decay": 0.5, "weight_decay_mode": "decoupled"},
    "textbook": {"dialect": "textbook"},
    "bias-correction": {"bias_correction": True},
    "eager": {"backend": "eager", "foreach": True},
}


def numbers(state):
    """A state's tensors as numbers."""
    return {name: value.tolist() for name, value in state.items()}


@pytest.mark.parametrize("settings", [*SETTINGS.values(), *OURS.values()], ids=[*SETTINGS, *OURS])
@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.parametrize("capturable", [False, True])
def test_d16_a_getter_of_distributed_checkpoints_moves_nothing(settings, lr, capturable):
    """It steps a fresh optimizer with zero gradients and lr 0: the state it makes is that of a fresh start."""
    settings = dict(settings)
    if lr == "tensor":
        settings["lr"] = torch.tensor(0.01)
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = RMSprop(model.named_parameters(), capturable=capturable, **settings)
    get_optimizer_state_dict(model, optimizer)
    square_avg_init = optimizer.param_groups[0]["square_avg_init"]
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert torch.equal(p, before[name])
        assert (state["step"] == 0).all()
        assert (state["square_avg"] == square_avg_init).all()
        assert all((state[slot] == 0).all() for slot in state.keys() - {"step", "square_avg"})
        assert set(state) == set(RMSprop([p], **settings)._stepper.read(optimizer.param_groups[0])[0].slots())
    twin = nn.Linear(2, 2)
    twin.load_state_dict(model.state_dict())
    other = RMSprop(twin.named_parameters(), capturable=capturable, **settings)
    for net, own in ((model, optimizer), (twin, other)):
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            own.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert numbers(optimizer.state[p]) == numbers(other.state[q])


def test_d16_torchs_getter_steps_and_pollutes():
    """The same with torch's optimizer: a step is counted, weight decay enters the averages, eps 0 makes NaN."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), weight_decay=0.5)
    get_optimizer_state_dict(model, optimizer)
    state = optimizer.state[model.weight]
    assert state["step"] == 1
    assert (state["square_avg"] > 0).all()
    optimizer = torch.optim.RMSprop(model.parameters(), eps=0.0)
    get_optimizer_state_dict(model, optimizer)
    assert model.weight.isnan().all()


def test_d16_a_first_step_with_a_gradient_counts_also_at_lr_0():
    """A warm-up that begins at 0 gathers averages from its first step."""
    p = nn.Parameter(torch.ones(2))
    optimizer = RMSprop([p], lr=0.0)
    p.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["square_avg"][1] > 0


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_goes_from_one_run_to_the_next(flatten):
    """get, set into a fresh optimizer, and go on bitwise; frozen parameters have no state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    settings = dict(momentum=0.9, centered=True, dialect="tensorflow1", lr=0.01)

    def begin():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        model[0].bias.requires_grad_(False)
        return model, RMSprop((p for p in model.parameters() if p.requires_grad), **settings)

    def go_on(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).square().sum().backward()
            optimizer.step()

    model, optimizer = begin()
    go_on(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    go_on(model, optimizer)
    other, resumed = begin()
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    go_on(other, resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
