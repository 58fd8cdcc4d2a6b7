"""torch's wrapper around `step`, entered only where somebody watches."""

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def watch(func: Callable[..., Any]) -> Callable[..., Any]:
    """`Optimizer.profile_hook_step`, entered only for a hook or a profiler: it costs 5 µs a step."""
    watched = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def _wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return watched(self, *args, **kwargs)
        return func(self, *args, **kwargs)

    return _wrapper
