"""DeepSpeed ZeRO with an optimizer that is not on its list of tested ones, which one configuration key allows.

Run: pip install . deepspeed && deepspeed examples/deepspeed_zero.py     (needs a compiler; one CPU is enough)
"""

import torch

from rmsprop import RMSprop

CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,  # the list is Adam, AdamW, Adagrad, Lion, and DeepSpeed's own
    "gradient_clipping": 1.0,  # instead of clip_norm=, since ZeRO passes one flat tensor per group
    "bf16": {"enabled": True},
}


def train(steps: int = 20) -> tuple[RMSprop, list[float]]:
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = RMSprop(model.parameters(), lr=1e-3, alpha=0.9, eps=1e-6)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    images, labels = torch.randn(32, 64, dtype=torch.bfloat16).to(engine.device), torch.arange(32) % 10
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(engine(images), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return optimizer, losses


if __name__ == "__main__":
    optimizer, losses = train()
    print(optimizer.explain(), f"\nloss {losses[0]:.2f} -> {losses[-1]:.2f}")
