"""timm: RMSprop under a name in timm's registry, for `create_optimizer_v2` and its training script's --opt.

Run: pip install . timm scikit-learn && python examples/timm_registry.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from torch.nn import functional

from rmsprop import RMSprop

# The name has no "_", because timm looks up only the part after the last one. Without has_momentum=, momentum stays
# 0; with it, timm's default is 0.9. timm's own rmsproptf entries also set alpha=0.9, which defaults= does here.
OURS = dict(dialect="timm", alpha=0.9, eps=1e-3)
default_registry.register(OptimInfo("rmspropours", RMSprop, "rmsprop.RMSprop", has_momentum=True, defaults=OURS))


def train(steps: int = 30, **options) -> tuple[RMSprop, list[float]]:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10, in_chans=1)
    # timm passes weight decay to the groups, not to the constructor, and leaves out biases and norms.
    optimizer = create_optimizer_v2(model, "rmspropours", **{"lr": 2e-3, "weight_decay": 1e-5, **options})
    images, labels = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images, losses = functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=32), []
    for step in range(steps):
        some = torch.arange(step * 32, step * 32 + 32) % len(labels)
        loss = functional.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return optimizer, losses


if __name__ == "__main__":
    optimizer, losses = train()
    print(optimizer.explain(), f"\nloss {losses[0]:.2f} -> {losses[-1]:.2f}")
