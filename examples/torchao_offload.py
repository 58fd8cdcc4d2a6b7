"""torchao's CPUOffloadOptimizer: state and steps on the CPU, parameters on the GPU. It needs CUDA.

Run: pip install . torchao && python examples/torchao_offload.py     (on a machine with an NVIDIA GPU)
"""

import torch
from torchao.optim import CPUOffloadOptimizer

from rmsprop import RMSprop


def offloaded(params) -> CPUOffloadOptimizer:
    # Each tensor of 4096 elements or more has its own RMSprop on the compiled CPU kernel. The others share one
    # on the GPU. Clip before step(), because clip_global_norm= would apply to one tensor at a time.
    return CPUOffloadOptimizer(params, RMSprop, lr=1e-3, alpha=0.9, eps=1e-6)


def train(steps: int = 20) -> tuple[CPUOffloadOptimizer, list[float]]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)).cuda()
    optimizer, losses = offloaded(net.parameters()), []
    images, labels = torch.randn(32, 64, device="cuda"), torch.arange(32, device="cuda") % 10
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return optimizer, losses


if __name__ == "__main__":
    optimizer, losses = train()
    for part in [*optimizer.optim_dict.values(), optimizer.d_opt]:
        print(part.explain())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
