"""Ultralytics-style trainers look up optimizers by name in torch.optim; a subclass of the trainer uses ours instead.

Run: pip install . && python examples/ultralytics_trainer.py     (`Trainer` stands in for ultralytics)
"""

import torch

from rmsprop import RMSprop


class Trainer:
    """A trainer that treats the optimizer's name and momentum as Ultralytics' BaseTrainer does."""

    def build_optimizer(self, model, name="RMSprop", lr=0.01, momentum=0.937, decay=5e-4):
        named = [(n, p) for n, p in model.named_parameters()]
        weights = {"params": [p for n, p in named if "bias" not in n], "weight_decay": decay, "param_group": "weight"}
        biases = {"params": [p for n, p in named if "bias" in n], "param_group": "bias"}
        return getattr(torch.optim, name)([weights, biases], lr=lr, momentum=momentum)


class WithOurs(Trainer):  # class WithOurs(ultralytics.models.yolo.detect.DetectionTrainer)
    """`YOLO(...).train(trainer=WithOurs, optimizer="RMSprop", momentum=0, warmup_momentum=0, warmup_bias_lr=0)`."""

    def build_optimizer(self, *args, **kwargs):
        groups = super().build_optimizer(*args, **kwargs).param_groups  # its grouping, weight decay, lr, and momentum
        kept = ("params", "param_group", "lr", "momentum", "weight_decay")
        return RMSprop([{name: group[name] for name in kept if name in group} for group in groups], alpha=0.9)


if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3))
    inherited = WithOurs().build_optimizer(model)
    print(*inherited.lint(), sep="\n")  # SGD's momentum of 0.937 makes steps 16 times lr
    print(WithOurs().build_optimizer(model, momentum=0.0, lr=1e-3).explain())
