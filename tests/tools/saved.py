"""State dicts of small trained networks, and archives with changed members."""

import itertools
import zipfile

import torch

SIZES = {"a": (3, 4, 2), "b": (4, 6, 3), "c": (5, 2)}


def net(which="a"):
    """Make a small network with distinct shapes."""
    sizes = SIZES[which]
    torch.manual_seed(ord(which))
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*layers)


def trained(module, make=torch.optim.RMSprop, params=None, **settings):
    """Make an optimizer after two steps."""
    optimizer = make(module.parameters() if params is None else params, lr=0.1, **settings)
    for at in range(2):
        torch.manual_seed(at)
        for param in module.parameters():
            param.grad = torch.randn_like(param) if param.requires_grad else None
        optimizer.step()
    return optimizer


def saved(which="a", **settings):
    """Return the model's and the optimizer's state dicts."""
    module = net(which)
    return module.state_dict(), trained(module, **settings).state_dict()


def other(which="c"):
    """Return the state dicts of a second network, trained by Adam."""
    return saved(which, make=torch.optim.Adam)


MODEL, STATE = saved()
MODEL2, STATE2 = other()
COPY = {name: value * 0.5 for name, value in MODEL.items()}
FLAT = {f"state.{name}.{slot}": value for at, name in enumerate(MODEL) for slot, value in STATE["state"][at].items()}
FLAT |= {
    f"param_groups.{name}.{word}": value
    for name in MODEL
    for word, value in STATE["param_groups"][0].items()
    if word != "params"
}
NAMED = {
    "state": {name: STATE["state"][at] for at, name in enumerate(MODEL)},
    "param_groups": [{**STATE["param_groups"][0], "params": list(MODEL)}],
}
TEXTS = {"state": {str(at): entry for at, entry in STATE["state"].items()}, "param_groups": STATE["param_groups"]}


def resaved(source, out, change):
    """An archive with `change(name, data)` applied to its members, stored, with sound checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), change(name, old.read(name)))
    return out
