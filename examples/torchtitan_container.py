"""A torchtitan-style container: one RMSprop per model part, and one flat state dict by name, saved with DCP.

Run: pip install . && python examples/torchtitan_container.py
"""

import tempfile

import torch
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint import state_dict as dcp

from rmsprop import RMSprop

FLAT = dcp.StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer:
    def __init__(self, parts: list[torch.nn.Module], **settings) -> None:
        self.pairs = [(part, RMSprop(part.named_parameters(), **settings)) for part in parts]  # named, as there

    def step(self) -> None:
        [optimizer.step() for _, optimizer in self.pairs]

    def state_dict(self) -> dict:
        return {k: v for pair in self.pairs for k, v in dcp.get_optimizer_state_dict(*pair, options=FLAT).items()}

    def load_state_dict(self, state: dict) -> None:
        [dcp.set_optimizer_state_dict(*pair, state, options=FLAT) for pair in self.pairs]


if __name__ == "__main__":
    parts = [torch.nn.ModuleDict({name: torch.nn.Linear(8, 8)}) for name in ("embed", "head")]
    ours, again = (OptimizersContainer(parts, lr=1e-3, alpha=0.95, momentum=0.9) for _ in range(2))
    parts[1]["head"](parts[0]["embed"](torch.ones(4, 8))).square().mean().backward()
    ours.step()
    [part.zero_grad() for part in parts]  # DCP does not load into a new optimizer if its parameters have gradients
    with tempfile.TemporaryDirectory() as folder:
        save({"optimizer": ours}, checkpoint_id=folder, no_dist=True)
        load({"optimizer": again}, checkpoint_id=folder, no_dist=True)
    print(again.pairs[1][1].explain(), again.state_dict()["state.head.bias.square_avg"], sep="\n")
