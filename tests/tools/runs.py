"""A run of one case under one backend, each of whose steps the reference judges."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from cases import SCHEDULE, Case, as64, errors, shapes_and_layouts, state64

from rmsprop import RMSprop, reference
from rmsprop.tensors.bucket import arithmetic_dtype


class Run:
    """A case under one backend, started in mid-run or fresh, whose steps are each judged by the reference."""

    def __init__(self, case: Case, dtype: torch.dtype, fresh: bool = False, **options: object) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(1)
        start = shapes_and_layouts(dtype, self.generator)
        if options.get("backend") == "cpu":  # it refuses tensors with holes, here (6, 8)[:, ::2]
            start = [value for value in start if value.stride() != (8, 2)]
        self.params = [torch.nn.Parameter(value) for value in start]
        self.optimizer = RMSprop(self.params, **{**case.settings(), **options})
        for param in () if fresh else self.params:
            self.optimizer.state[param] = self._midway(param)

    def _midway(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """A state as a run would have gathered it: the first bias-corrected centered step has no variance."""
        dtype = arithmetic_dtype(param.dtype)

        def like(values: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format).copy_(values)

        noise = torch.randn(param.shape, generator=self.generator, dtype=torch.float64)
        state = {"step": torch.tensor(4.0), "square_avg": like(0.5 + noise * noise)}
        if self.case.rule.centered:
            state["grad_avg"] = like(0.2 * noise)
        if self.case.rule.momentum:
            state["momentum_buffer"] = like(noise * (0.01 if self.case.rule.lr_in_buffer else 1.0))
        return state

    def gradient(self, param: torch.Tensor) -> torch.Tensor:
        """A gradient in the parameter's layout, with some exact zeros and small and large entries."""
        noise = torch.randn(param.shape, generator=self.generator, dtype=torch.float64)
        scale = 10.0 ** torch.randint(-2, 2, param.shape, generator=self.generator)
        zero = torch.rand(param.shape, generator=self.generator) < 0.1
        values = (noise * scale).masked_fill(zero, 0.0)
        return torch.empty_like(param, memory_format=torch.preserve_format).copy_(values).detach()

    def steps(self, schedule: tuple[float, ...] = SCHEDULE) -> Iterator[dict[str, float]]:
        """Take a step per learning rate; yield the largest error of each slot, in units in the last place."""
        for lr in schedule:
            self.optimizer.param_groups[0]["lr"] = lr
            for param in self.params:
                param.grad = self.gradient(param)
            yield self.judged(lr)

    def judged(self, lr: float) -> dict[str, float]:
        """Take one step with the gradients that are set, and compare it with the reference's."""
        state = self.optimizer.state
        rule = self.case.rule
        before = [(as64(p), state64(state[p]) if state[p] else reference.start(rule, as64(p))) for p in self.params]
        grads = [p.grad.clone() for p in self.params]
        self.optimizer.step()
        case = Case(rule, replace(self.case.hyper, lr=lr))
        worst: dict[str, float] = {}
        for param, old, grad in zip(self.params, before, grads, strict=True):
            assert torch.equal(param.grad.nan_to_num(), grad.nan_to_num()), "the gradient was edited"
            for name, error in errors(case, old, as64(grad), (param, state[param])).items():
                worst[name] = max(worst.get(name, 0.0), error)
        return worst
