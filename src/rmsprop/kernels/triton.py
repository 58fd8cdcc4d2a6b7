"""Computes the lines by one launch over all tensors of a bucket on an NVIDIA GPU: triton_kernel.py.

It has not been run on a GPU yet. Under Triton's interpreter it reproduces the reference's numbers. Its PTX for sm_80
and sm_90, run on a CPU by tests/tools/ptx_machine.py, reproduces the CPU kernel's bits. bench/gpu.py checks and times
it on a GPU.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rmsprop.kernels import rounding
from rmsprop.kernels.base import Backend
from rmsprop.kernels.refusals import count_writes, refuse_call, refuse_memory, refuse_rule, refuse_slots, types
from rmsprop.kernels.triton_bounds import NONE, Bounds, averaging
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket, arithmetic_dtype, kind

# Elements and warps of one program, with which a prototype reached an H100's copy rate.
BLOCK, WARPS = 4096, 8
LANES = 256  # tensors, or sums of blocks, that a program of the other kernels takes at once

# The dtypes of parameters that the kernel takes.
_TAKEN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Columns of the table, and the indices of some of them: triton_kernel.py.
COLUMNS, ADDRESSES, SIZE, FIRST, CORRECTION, RANDOM, EMA, SHARE = 13, 7, 7, 8, 9, 10, 11, 12

# Tensors that captured graphs read at every replay, by id. They are never freed, since a graph's end is not known.
_REPLAYED: dict[int, Tensor] = {}

# Pinned buffers kept ready for tables that are first needed during a capture, when they cannot be allocated. They
# limit the number of steps that can be captured between two steps outside of a capture.
_SPARES = 4


def refuse(rule: Rule, bucket: Bucket) -> str | None:
    """Refuse all but dense, real, separate tensors on one NVIDIA GPU, each with gradient and slots in one layout."""
    reason = refuse_call(bucket) or refuse_rule(rule) or refuse_reading(rule, bucket)
    return reason or _refuse_device(bucket) or refuse_tensors(rule, bucket)


def step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Advance every tensor in the bucket by one RMSprop step, in place, without waiting for the device.

    Equation: spec.py, lines [1]-[10].
    Shapes:   param[i], grad[i] and each slot share one shape.
    Mutates:  bucket.param and the slots. Never bucket.grad.
    """
    if not bucket.param:
        return
    table = _tables[bucket.param[0]] = table_of(bucket)
    work = Work(rule, bucket)
    if not work.clock:
        count(rule, hyper, bucket, table)
    work.launch(hyper, table, bucket.grad_scale, bucket.found_inf)
    count_writes(bucket.param)


TRITON = Backend("triton", refuse, step)


class Table:
    """The addresses and sizes of tensors in one array for the kernel, sent to the device only if it changed.

    Shapes: columns[k, i] is column k of tensor i (triton_kernel.py). `owner` is the tensor of each block.
    """

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        count = len(sizes)
        blocks = [max(1, -(-size // BLOCK)) for size in sizes]  # an empty tensor has one, which counts its step
        self.blocks = sum(blocks)
        self.host = np.zeros(COLUMNS * count + (self.blocks + 1) // 2, np.int64)
        self.columns = self.host[: COLUMNS * count].reshape(COLUMNS, count)
        self.columns[FIRST] = np.cumsum([0, *blocks[:-1]])
        self.columns[CORRECTION] = np.ones(count).view(np.int64)
        owner = self.host[COLUMNS * count :].view(np.int32)
        owner[: self.blocks] = np.repeat(np.arange(count, dtype=np.int32), blocks)
        self.clipping: Any = None  # the buffers of triton_clipping.py, for this table's work and those after it
        self._sent: tuple[bytes, int] = (b"", 0)
        self._there: tuple[Tensor, ...] = ()
        self._spares: list[Tensor] = []
        self.sendings = 0

    def update(self, bucket: Bucket) -> None:
        """Write the current addresses of a bucket's tensors into the table."""
        for k, values in zip((*range(ADDRESSES), EMA), bucket.lists(), strict=True):
            self.columns[k] = [x.data_ptr() for x in values] if values else 0
        self.columns[SIZE] = self.sizes
        if bucket.random_keys:
            self.columns[RANDOM] = np.array(bucket.random_keys, np.uint64).view(np.int64)

    def on_device(self, capturable: bool) -> Tensor:
        """Return the table in device memory, for kernels on the current stream.

        A kernel may still be reading a table, so tables are never overwritten. A changed table, and one for another
        stream, is a new tensor with its own staging buffer.

        A captured graph reads the table of a step before the capture, if no tensor has moved. Its replays come after
        that step, which wrote the same parameters, and so after the copy that the step waited for. If a gradient
        moved, as in a graph that includes the backward pass, the graph copies the table itself, from pinned memory.
        Such a copy happens only at a replay, so only the graph may read that table.
        """
        now = self.columns.tobytes()
        if self.device.type != "cuda":  # Triton's interpreter
            if self._sent != (now, 0):
                self._sent, self._there = (now, 0), (torch.from_numpy(self.host.copy()),)
                self.sendings += 1
            return self._there[0]
        if torch.cuda.is_current_stream_capturing():
            kept = self._there if self._sent[0] == now else self._send(self._spare())
            _REPLAYED.update((id(x), x) for x in kept)
            return kept[0]
        if capturable:
            self.prepare()
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if self._sent != (now, stream):
            self._there = self._send(self._pinned())
            self._sent = (now, stream)
        return self._there[0]

    def prepare(self) -> None:
        """Allocate pinned buffers for later captures, during which they cannot be allocated."""
        while len(self._spares) < _SPARES:
            self._spares.append(self._pinned())

    def _send(self, staging: Tensor) -> tuple[Tensor, Tensor]:
        """Start a copy of the table to the device. Return the copy and its staging buffer, which only it reads."""
        staging.numpy()[:] = self.host
        there = torch.empty(len(self.host), dtype=torch.int64, device=self.device)
        there.copy_(staging, non_blocking=True)
        self.sendings += 1
        return there, staging

    def _pinned(self) -> Tensor:
        """Return a staging buffer. torch reuses its memory only after the copies from it are done."""
        return torch.empty(len(self.host), dtype=torch.int64, device="cpu", pin_memory=True)

    def _spare(self) -> Tensor:
        if not self._spares:
            raise RuntimeError(
                "a CUDA graph is being captured, but no staging buffer for the addresses is left: take an optimizer "
                f"step before the capture (warm-up), and capture at most {_SPARES} steps before the next one outside"
            )
        return self._spares.pop()


_tables: Any = WeakIdKeyDictionary()  # tables by a bucket's first parameter; updated at every step


def table_of(bucket: Bucket) -> Table:
    """Return the last step's table if it fits, else a new one, with the current addresses. The caller owns it."""
    first, sizes = bucket.param[0], tuple(p.numel() for p in bucket.param)
    table: Table | None = _tables.pop(first, None)
    if table is None or table.sizes != sizes or table.device != first.device:
        table = Table(sizes, first.device)
    table.update(bucket)
    return table


class Work:
    """The arguments of a launch that stay the same from step to step."""

    def __init__(self, rule: Rule, bucket: Bucket) -> None:
        first, (param, square, state, _, ema) = bucket.param[0], types(bucket)
        self.device, self.count, self.capturable = first.device, len(bucket.param), bucket.capturable
        self.clock = counter(bucket)
        self.rule, self.arithmetic = rule, arithmetic_dtype(param)
        self.stochastic, self.narrowed = bucket.rounding == "stochastic", bucket.state_dtype != "float32"
        self.averaged = bool(bucket.slots["ema"])
        self._counts_for_all = rule.bias_correction or self.stochastic or self.narrowed
        read = (param, square, ema) if self.averaged else (param, square)
        widest = max(read, key=lambda dtype: dtype.itemsize)
        self.fixed = {
            "param": _type(param),
            "square": _type(square),
            "state": _type(state),
            "ema": _type(ema),
            "widest": _type(widest),
            "clock": None if self.clock is None else _type(self.clock),
            "arithmetic": _type(self.arithmetic),
            "eps_mode": rule.eps_mode,
            "centered": rule.centered,
            "momentum": rule.momentum,
            "nesterov": rule.nesterov,
            "lr_in_buffer": rule.lr_in_buffer,
            "decoupled": rule.weight_decay_mode in ("decoupled", "corrected"),
            "bias_correction": rule.bias_correction,
            "maximize": rule.maximize,
            "narrowed": self.narrowed,
            "stochastic": self.stochastic,
            "compensated": bool(bucket.slots["compensation"]),
            "block": BLOCK,
            "piece": BLOCK // 4,
            "enable_fp_fusion": False,  # round as the CPU kernel does
            "sanitize_overflow": False,  # random bits wrap around, also under TRITON_DEBUG
        }
        self._ready: dict[Any, tuple[Any, list[Any]]] = {}  # compiled kernels with their constants in order

    def launch(
        self,
        hyper: Hyper,
        table: Table,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        bounds: Bounds = NONE,
        there: Tensor | None = None,
    ) -> None:
        """Launch once on the current stream, or twice if [4], [10] or random bits need steps the device counts.

        Args:
            there: the table on the device, if it is there already.
        """
        device = self.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self.launch(hyper, table, grad_scale, found_inf, bounds, there)
        there = table.on_device(self.capturable) if there is None else there
        lr, lr_at = _learning_rate(hyper.lr, device)
        grad_scale, found_inf = (
            None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf)
        )
        extras = self.extras(hyper, bounds)
        if self.counted_before(extras):
            self.start("count_steps", {}, -(-self.count // LANES), (there, self.count, found_inf), (found_inf,))
        alpha = hyper.alpha
        decay = float(hyper.shrinkage(self.rule))
        early = bounds.early(self.rule, hyper)
        arguments = (
            there,
            self.count,
            lr,
            alpha,
            1 - alpha,
            math.log(alpha) if alpha else -math.inf,
            hyper.eps,
            hyper.momentum,
            0.0 if early else decay,
            lr_at,
            grad_scale,
            found_inf,
            hyper.cap,
            hyper.carried(),
            math.inf if hyper.clip_weights is None else hyper.clip_weights,
            *averaging(hyper),
            bounds.coefficients,
            early,
            bounds.value,
            bounds.last,
        )
        self.start("advance", extras, table.blocks, arguments, (lr_at, grad_scale, found_inf, bounds.coefficients))
        return None

    def start(
        self,
        name: str,
        extras: dict[str, Any],
        blocks: int,
        arguments: tuple[Any, ...],
        read: tuple[Tensor | None, ...],
    ) -> None:
        """Launch a kernel. Compiled kernels are cached here, since Triton's own look-up takes 20 µs on the host.

        Args:
            name: the kernel's name.
            extras: the arguments of `extras`.
            read: the arguments that may be a tensor or None.
        """
        key = (name, *extras.values(), *(None if x is None else x.dtype for x in read))
        if key in self._ready:
            kernel, constants = self._ready[key]
            kernel[blocks, 1, 1](*arguments, *constants)
            return
        kernels = load()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        source = getattr(kernels, name)
        named = {**self.fixed, **extras}
        if name != "advance":
            own = {"block": BLOCK if name == "squares" else LANES, "summed": BLOCK, "num_warps": WARPS}
            options = ("enable_fp_fusion", "sanitize_overflow", "num_warps")
            named = {key: x for key, x in {**named, **own}.items() if key in options or key in source.arg_names}
        kernel = source[(blocks,)](*arguments, **named)
        if isinstance(kernel, _compiled()):  # the interpreter has none
            self._ready[key] = kernel, [named[arg] for arg in source.arg_names[len(arguments) :]]

    def counted_before(self, extras: dict[str, Any]) -> bool:
        """Return whether the device counts steps in a launch of its own, since all programs need the counts."""
        return self.clock is not None and (self._counts_for_all or extras["averaged"])

    def extras(self, hyper: Hyper, bounds: Bounds = NONE) -> dict[str, Any]:
        """Return the arguments of a launch that depend on which bounds and averages its numbers ask for.

        Kernels that need more registers per element (up to 184 for 16 elements) get twice the warps. A multiprocessor
        then runs 16 warps of one block, instead of two blocks.
        """
        capped, averaged = hyper.max_update is not None, self.averaged and hyper.average is not None
        many = self.stochastic or self.narrowed or self.fixed["compensated"] or (capped and self.rule.centered)
        return {
            "capped": capped,
            "walled": hyper.clip_weights is not None,
            "averaged": averaged,
            "warm_up": hyper.average.warmup if averaged and hyper.average is not None else None,
            "clipped": bounds.kind(self.rule, capped),
            "pulled": bounds.early(self.rule, hyper) != 0,
            "num_warps": 2 * WARPS if many else WARPS,
        }


def counter(bucket: Bucket) -> torch.dtype | None:
    """Return the dtype of step counters that the kernel counts. None if the host counts them."""
    first = bucket.slots["step"][0]
    return first.dtype if bucket.capturable or not first.is_cpu else None


def count(rule: Rule, hyper: Hyper, bucket: Bucket, table: Table) -> None:
    """Increment the step counters on the host. Compute 1 − αᵗ of [4], 1 − d of [10] and the keys of random bits."""
    torch._foreach_add_(
        bucket.slots["step"], torch.tensor(1.0, dtype=bucket.slots["step"][0].dtype, device="cpu"), alpha=1.0
    )
    if rule.bias_correction:
        table.columns[CORRECTION] = np.array([1 - hyper.alpha ** t.item() for t in bucket.slots["step"]]).view(
            np.int64
        )
    if bucket.random_keys:
        keys = [rounding.keys(own, int(t)) for own, t in zip(bucket.random_keys, bucket.slots["step"], strict=True)]
        table.columns[RANDOM] = np.array([a | b << 32 for a, b in keys], np.uint64).view(np.int64)
    if hyper.average is not None and bucket.slots["ema"]:
        decays = [hyper.average.decay_at(int(t)) for t in bucket.slots["step"]]
        table.columns[SHARE] = np.array([-1.0 if d is None else 1 - d for d in decays]).view(np.int64)


def _learning_rate(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """Return the learning rate as a number, or as a tensor on the device."""
    if not isinstance(lr, Tensor):
        return lr, None
    if lr.is_cpu and device.type != "cpu":
        return lr.item(), None
    return 0.0, lr.detach().to(device, non_blocking=True)


@cache
def load() -> Any:
    """Return the module of the kernels, or why it cannot be imported. Triton is not imported earlier."""
    try:
        from rmsprop.kernels import triton_norms
    except ImportError as error:
        return (
            f"Triton cannot be imported ({error}): install it with `pip install triton` (torch for CUDA on Linux "
            "brings it; on Windows `pip install triton-windows`)"
        )
    return triton_norms


@cache
def _compiled() -> type:
    """Return Triton's class of compiled kernels."""
    import triton.compiler

    kind: type = triton.compiler.CompiledKernel
    return kind


@cache
def _type(dtype: torch.dtype) -> Any:
    """Return Triton's object for a dtype."""
    import triton.language

    return getattr(triton.language, _name(dtype))


def _name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, which is Triton's too."""
    return str(dtype).removeprefix("torch.")


def _refuse_device(bucket: Bucket) -> str | None:
    """Return a reason to refuse the parameters' device."""
    if not bucket.param:
        return None
    device = bucket.param[0].device
    if device.type != "cuda":
        untested = "" if device.type == "cpu" else f"; on {device.type} it is untested"
        return f"the parameters are on {device}, and it computes on NVIDIA GPUs{untested}"
    if torch.version.hip is not None:
        return "this torch is built for AMD's ROCm, where it is untested; it computes on NVIDIA GPUs"
    if _capability(device.index) < (8, 0):
        return (
            f"{device} has compute capability {'.'.join(map(str, _capability(device.index)))}, and Triton needs 8.0"
        )
    kernels = load()
    return kernels if isinstance(kernels, str) else None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def refuse_reading(rule: Rule, bucket: Bucket) -> str | None:
    """Return a reason to refuse a step that would read back from the device."""
    if rule.weight_decay_mode == "corrected" and bucket.capturable:
        return 'weight_decay_mode="corrected" reads the learning rate on the host, which capturable=True forbids'
    return None


def refuse_tensors(rule: Rule, bucket: Bucket) -> str | None:
    """Return a reason to refuse the tensors."""
    if not bucket.param:
        return None
    device, dtype, family = kind(bucket.param[0])
    if family is not Tensor:
        return f"the parameters are {family.__name__}, a subclass of Tensor whose memory means something else"
    if dtype not in _TAKEN:
        return f"the parameters are {dtype}, and it takes {', '.join(map(_name, _TAKEN))}"
    for name, values in (("parameters", bucket.param), ("gradients", bucket.grad), *bucket.shaped().items()):
        for x in values:
            if x.layout != torch.strided:
                return f"the {name} are {x.layout}, and it takes dense tensors"
            if x.device != device or x.is_neg() or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
                return f"the {name} are not all plain tensors on {device}"
    if any(g.dtype != dtype for g in bucket.grad):
        return f"some gradients are not {dtype} as their parameters are"
    if any(c.dtype != dtype for c in bucket.slots["compensation"]):
        return f"some remainders of compensation=True are not {dtype} as their parameters are"
    return _refuse_steps(bucket, device) or refuse_slots(rule, bucket) or refuse_memory(bucket)


def _refuse_steps(bucket: Bucket, device: torch.device) -> str | None:
    """Return a reason to refuse the step counters' devices."""
    if not bucket.slots["step"]:
        return None
    on_host = counter(bucket) is None
    for t in bucket.slots["step"]:
        if t.device != (torch.device("cpu") if on_host else device):
            setting = "capturable=True and " if bucket.capturable else ""
            return f"{setting}a step counter is on {t.device}, while others, or the parameters, are on {device}"
    if on_host and bucket.found_inf is not None:
        return "found_inf is on the device, but steps are counted on the host; give capturable=True"
    return None
