"""skorch: RMSprop in a scikit-learn estimator, with weight decay by group; skorch steps with a closure.

Run: pip install . skorch && python examples/skorch_digits.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier

from rmsprop import RMSprop


def train(epochs: int = 3) -> tuple[NeuralNetClassifier, float]:
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    net = NeuralNetClassifier(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=RMSprop,
        lr=1e-3,  # skorch always passes lr, by default 0.01, so use lr and not a dialect's learning_rate=
        optimizer__alpha=0.9,
        optimizer__eps=1e-6,
        optimizer__momentum=0.5,
        optimizer__weight_decay=1e-4,
        optimizer__param_groups=[("*.bias", {"weight_decay": 0.0})],
        max_epochs=epochs,
        train_split=None,
        verbose=0,
    )
    return net.fit(x, y), net.score(x, y)


if __name__ == "__main__":
    net, accuracy = train()
    print(net.optimizer_.explain(), f"\naccuracy {accuracy:.1%}")
