"""Accelerate: `prepare` wraps RMSprop and reloads its state; RMSprop takes the steps.

Run: pip install . accelerate scikit-learn && python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from rmsprop import RMSprop


def train(epochs: int = 3) -> tuple[RMSprop, float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    x, y = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    x = x.float() / 16
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = RMSprop(net.parameters(), lr=1e-3, dialect="keras3", rho=0.9, epsilon=1e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32, shuffle=True)
    # amp_in_step stays False; otherwise step_was_skipped is never True, and the schedule advances at skipped steps.
    model, wrapped, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(images), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
    return wrapped.optimizer, (net(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    optimizer, accuracy = train()
    print(optimizer.explain(), f"\naccuracy {accuracy:.1%}")
