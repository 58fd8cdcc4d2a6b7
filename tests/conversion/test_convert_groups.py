"""Parameters without state, outside the optimizer, tied or unnamed, in the report and in OUT."""

import torch
from saved import net, trained

from rmsprop import RMSprop
from rmsprop.conversion.file import prepare, write, writer


def converted(tmp_path, content):
    """Return the report's assumptions as one text, and the state dict written directly and through another file."""
    path, through, out = tmp_path / "in.pt", tmp_path / "through.safetensors", tmp_path / "out.pt"
    torch.save(content, path)
    plan = prepare(path)
    write(prepare(path, out=writer(through)), through, force=True)
    write(prepare(through), out, force=True)
    again = torch.load(out, weights_only=True)["optimizer"]
    write(plan, out, force=True)
    once = torch.load(out, weights_only=True)["optimizer"]
    assert again["state"].keys() == once["state"].keys()
    assert again["param_groups"] == once["param_groups"]
    return "\n".join(plan.report.assumed), torch.load(out, weights_only=True)["optimizer"]


def named(module, optimizer):
    """Return the optimizer's state dict with torch's names."""
    names = {param: name for name, param in module.named_parameters()}
    packed = optimizer.state_dict()
    for group, own in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names[param] for param in own["params"]]
    return packed


def loads(optimizer, written, module):
    """Assert that each parameter has the state that it had, in torch's class and in ours."""
    for make in (torch.optim.RMSprop, RMSprop):
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        other = make(groups, lr=0.1)
        other.load_state_dict(written)
        for param in module.parameters():
            assert optimizer.state[param].keys() == other.state[param].keys()
            for slot, value in optimizer.state[param].items():
                torch.testing.assert_close(
                    other.state[param][slot], value, rtol=0, atol=0, check_dtype=slot != "step"
                )


def test_a_parameter_that_never_had_a_gradient_stays_in_the_optimizer(tmp_path):
    """It keeps its place, with a model in the file or not, so every other parameter keeps its state."""
    module = net()
    module[0].bias.requires_grad_(False)
    optimizer = trained(module)
    for content in ({"optimizer": optimizer.state_dict()}, {"m": module.state_dict(), "o": optimizer.state_dict()}):
        said, written = converted(tmp_path, content)
        assert len(written["param_groups"][0]["params"]) == 4
        assert "1 parameter (" in said
        assert "not in the optimizer" not in said
        loads(optimizer, written, module)


def test_a_frozen_base_is_not_in_the_optimizer(tmp_path):
    """Only the head is trained, under its own names; the rest is reported and gets no state."""
    module = net()
    optimizer = trained(module, params=[*module[1].parameters()])
    said, written = converted(tmp_path, {"model": module.state_dict(), "optimizer": named(module, optimizer)})
    assert "2 tensors ('0.weight', '0.bias') are not in the optimizer" in said
    assert written["param_groups"][0]["param_names"] == ["1.weight", "1.bias"]


def test_tied_weights_have_one_state_under_their_first_name(tmp_path):
    """The second name is in the model, is not a parameter of its own, and does not shift the others' state."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    optimizer = trained(module)
    said, written = converted(tmp_path, {"model": module.state_dict(), "optimizer": optimizer.state_dict()})
    assert "'1.weight' is '0.weight' under another name" in said
    assert "not in the optimizer" not in said
    assert written["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    loads(optimizer, written, module)


def test_weight_decay_groups_without_names_are_not_said_to_be_outside(tmp_path):
    """timm lists biases first; if the order does not fit the model, the state keeps numbers and loads by them."""
    module = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    groups = [
        {"params": [layer.bias for layer in module], "weight_decay": 0.0},
        {"params": [layer.weight for layer in module], "weight_decay": 0.1},
    ]
    optimizer = trained(module, params=groups)
    said, written = converted(tmp_path, {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict()})
    assert "not in the optimizer" not in said
    assert [group["weight_decay"] for group in written["param_groups"]] == [0.0, 0.1]
    loads(optimizer, written, module)
