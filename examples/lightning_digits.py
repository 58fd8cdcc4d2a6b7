"""Lightning: digits with bfloat16 autocast, gradient clipping, and a schedule; its Trainer steps with a closure.

Run: pip install . lightning scikit-learn && python examples/lightning_digits.py
"""

import lightning
import torch
from sklearn.datasets import load_digits

from rmsprop import RMSprop


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        # amp_in_step stays False; otherwise Lightning refuses gradient_clip_val under mixed precision.
        optimizer = RMSprop(self.parameters(), lr=1e-3, alpha=0.9, eps=1e-7, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def train(epochs: int = 3, precision: str = "bf16-mixed") -> tuple[RMSprop, float]:
    lightning.seed_everything(0, verbose=False)
    x, y = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    data = torch.utils.data.TensorDataset(x.float() / 16, y)
    model, quiet = Digits(), dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    clipped = dict(precision=precision, gradient_clip_val=1.0, accelerator="cpu")
    trainer = lightning.Trainer(max_epochs=epochs, **clipped, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(data, 64, shuffle=True))
    return trainer.optimizers[0], (model.net(x.float() / 16).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    optimizer, accuracy = train()
    print(optimizer.explain(), f"\naccuracy {accuracy:.1%}")
