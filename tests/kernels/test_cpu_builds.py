"""Other builds of the same source: one instruction set each gives the same bits, and mistakes are caught."""

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import mostly_long
from cpu_parity import BOUND, F32, F64, SIZES, TYPES, copied, rules, spiked, stepped, tensors, worst
from halves import check_written, rounded_as, twin
from narrowed import STATES, again, check_narrowed, identical, in_float32, narrowed

import rmsprop
from rmsprop import reference
from rmsprop.kernels import cpu, native
from rmsprop.spec import EPS_MODES, Averaging, Hyper, Rule, StateDtype
from rmsprop.tensors.bucket import Bucket

SOURCES = Path(rmsprop.__file__).parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
QUICK = shutil.which("clang++") or COMPILER  # compiles without optimization in half the time of g++

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(COMPILER is None or not SOURCES.exists(), reason="no compiler, or an installed package"),
]


def build(folder: Path, *flags: str, compiler: str | None = QUICK) -> native.Native:
    """The kernel, compiled with these flags more."""
    folder.mkdir(exist_ok=True)
    out = folder / "_native.so"
    always = ["-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    sources = [str(SOURCES / name) for name in ("rmsprop.cpp", "plan.cpp")]
    subprocess.run([str(compiler), *always, *flags, "-o", str(out), *sources], check=True)
    loaded = native.load(out)
    assert not isinstance(loaded, str)
    return loaded


# Digest of the declarations of rmsprop.h and plan.h, without comments and space, by INTERFACE.
DECLARED = {2: "071b25d3f65646d8"}


def test_another_interface_has_another_number() -> None:
    """The structures and functions that Python mirrors are those that INTERFACE stands for."""
    text = "".join((SOURCES / name).read_text(encoding="utf-8") for name in ("rmsprop.h", "plan.h"))
    text = re.sub(r"//.*|constexpr int32_t kInterface = \d+;|\s", "", text)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DECLARED[native.INTERFACE]


@pytest.mark.parametrize("text", ["", 'extern "C" int rmsprop_interface() { return 0; }'], ids=["none", "another"])
def test_a_library_of_another_interface_is_refused(tmp_path: Path, text: str) -> None:
    """One that was built before the structures changed is a reason in words: it would read other memory."""
    (tmp_path / "old.cpp").write_text(text, encoding="utf-8")
    old = tmp_path / "_native.so"
    subprocess.run([str(QUICK), "-fPIC", "-shared", "-o", str(old), str(tmp_path / "old.cpp")], check=True)
    reason = native.load(old)
    assert isinstance(reason, str)
    assert "built from another version of this package; install it again" in reason


def results(types: tuple, seed: int) -> list[Bucket]:
    """What the loaded kernel makes of many rules."""
    found = []
    for switches in (("outside", False, (0, 0, 0)), ("floor", True, (1, 1, 1)), ("both", True, (1, 0, 0))):
        for rule, hyper in rules(*switches):
            bucket = tensors(rule, types, SIZES, seed)
            cpu.step(rule, hyper, bucket)
            found.append(bucket)
    return found


def clipped_results(types: tuple, seed: int) -> list[Bucket]:
    """What the loaded kernel makes of gradients that it clips in every way, of several blocks of a norm, averaged."""
    bounds = dict(clip_value=0.9, clip_norm=3.0, clip_global_norm=2.0)
    found = []
    for after, last in product((False, True), (False, True)):
        group = {**bounds, "clip_after_decay": after, "clip_value_last": last}
        rule = Rule(momentum=True)
        hyper = Hyper(0.03, 0.9, 1e-3, 0.8, 0.05, clip_weights=1.5, average=Averaging(0.9, "tensorflow"))
        bucket = tensors(rule, types, (5, 9001), seed)
        bucket.slots["ema"] = [x * 0.7 for x in bucket.slots["square_avg"]]
        cpu.clip_and_step([(group, rule, hyper, bucket)])
        found.append(bucket)
    return found


def narrowed_results(dtype: torch.dtype, seed: int) -> list[Bucket]:
    """What the loaded kernel makes of state in fewer bytes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for state_dtype, way in product(STATES, product((False, True), repeat=2)):
        for rule, hyper in rules("both", True, (1, 1, 0)):
            bucket = tensors(rule, (dtype, F32), SIZES, seed)
            if dtype != F32:
                bucket = rounded_as(bucket, stochastic=way[0], compensated=way[1], generator=generator)
            bucket = narrowed(bucket, state_dtype)
            cpu.step(rule, replace(hyper, max_update=1.5 if way[0] else None), bucket)
            found.append(bucket)
    return found


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> tuple[native.Native, ctypes.c_int32]:
    """A kernel with mistakes that can be switched on, and the number of the one that is: RMSPROP_BROKEN in csrc."""
    folder = tmp_path_factory.mktemp("breakable")
    broken = build(folder, "-O0", "-DRMSPROP_ONE_TARGET", "-DRMSPROP_BREAKABLE")
    return broken, ctypes.c_int32.in_dll(ctypes.CDLL(str(folder / "_native.so")), "rmsprop_broken")


# Bits agree because nothing is contracted into a fused multiply-add but what the source says, and that is emulated
# where there is none: in the baseline.
TARGETS = {"baseline": "x86-64", "avx2": "haswell", "avx512": "skylake-avx512"}


def runs(target: str) -> bool:
    """Whether this machine can run the target's instructions."""
    info = Path("/proc/cpuinfo")
    needed = {"baseline": "sse2", "avx2": "avx2", "avx512": "avx512bw"}[target]
    return info.exists() and needed in info.read_text()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize(
    ("target", "level"),
    mostly_long([("baseline", "-O0"), *product(TARGETS, ["-O3"])], lambda i, _: i == 0, unpack=True),
)
def test_instruction_sets_give_the_same_bits(
    target: str, level: str, breakable: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX-512, AVX2 and plain x86-64 agree in every bit with the build that chooses for itself."""
    best = max(filter(runs, TARGETS), key=list(TARGETS).index)
    if not runs(target) or (target == best and level == "-O3"):
        pytest.skip(f"the build chooses {best} on this machine, and {target} is not below it")
    if level == "-O0":
        one, _ = breakable
    else:
        one = build(tmp_path, level, "-DRMSPROP_ONE_TARGET", f"-march={TARGETS[target]}", compiler=COMPILER)
    makers = [partial(maker, types) for types in TYPES for maker in (results, clipped_results)]
    narrow = [torch.bfloat16] if level == "-O0" else [F32, torch.bfloat16, torch.float16]
    makers += [partial(narrowed_results, dtype) for dtype in narrow]
    for make in makers:
        chosen = make(seed=20)
        with monkeypatch.context() as patch:
            patch.setattr(native, "load", lambda: one)
            mine = make(seed=20)
        assert all(identical(a, b) for a, b in zip(chosen, mine, strict=True))


FUSED = """
#include "types.h"
extern "C" void many(const float* x, long long count, float* out) {
  for (long long i = 0; i < count; ++i) out[i] = fused(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or not runs("avx2"), reason="needs a processor that has both")
def test_an_emulated_multiply_add_is_rounded_once(tmp_path: Path) -> None:
    """Ties that a far smaller addend breaks, subnormal results, overflow, NaN: bit by bit what the processor has."""
    (tmp_path / "fused.cpp").write_text(FUSED)
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(200_000, 3)) * 10.0 ** generator.integers(-25, 13, (200_000, 3))
    near = np.float32(1) + generator.integers(-4096, 4096, (200_000, 3)) * np.float32(2.0**-23)
    near[:, 2] *= 2.0 ** generator.integers(-80, 3, 200_000)  # products just beside a tie, and what tips them
    near[:, 2] *= generator.choice([-1, 1], 200_000)
    tie = [[1 + 2.0**-12, 1 + 2.0**-12, sign * 2.0**-k] for sign in (1, -1) for k in range(20, 140)]
    odd = [0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-38, np.inf, -np.inf, np.nan]
    special = np.array(np.meshgrid(odd, odd, odd)).reshape(3, -1).T
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(np.concatenate([drawn, near, tie, special]), np.float32)
    found = []
    for target in ("x86-64", "haswell"):
        out = tmp_path / f"{target}.so"
        words = [str(COMPILER), "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-DRMSPROP_ONE_TARGET"]
        words += ["-fPIC", "-shared", f"-march={target}", f"-I{SOURCES}", "-o", str(out), str(tmp_path / "fused.cpp")]
        subprocess.run(words, check=True)
        result = np.empty(len(numbers), np.float32)
        ctypes.CDLL(str(out)).many(
            numbers.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(numbers)),
            result.ctypes.data_as(ctypes.c_void_p),
        )
        found.append(result)
    emulated, native_ = found
    assert np.array_equal(np.isnan(emulated), np.isnan(native_))
    assert np.array_equal(np.nan_to_num(emulated).view(np.uint32), np.nan_to_num(native_).view(np.uint32))
    # what is tested matters: rounding twice would show
    a, b, c = numbers[: -len(special)].astype(np.float64).T
    with np.errstate(over="ignore"):
        assert ((a * b + c).astype(np.float32) != native_[: -len(special)]).any()


@pytest.fixture
def break_it(
    breakable: tuple[native.Native, ctypes.c_int32], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], None]]:
    """A function that switches one mistake on, in the kernel that every step then uses. 0: none."""
    broken, number = breakable
    monkeypatch.setattr(native, "load", lambda: broken)
    yield lambda mistake: setattr(number, "value", mistake)
    number.value = 0


MISTAKES = {"eps": 1, "lr": 2, "beta": 3, "gradient": 4}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_caught(mistake: str, break_it: Callable[[int], None]) -> None:
    """ε or lr on the wrong side, 1 − α a millionth off, or an edited gradient: the comparison sees it."""
    break_it(MISTAKES[mistake])
    for eps_mode in EPS_MODES if mistake != "eps" else ("outside", "inside"):
        for types in ((F32, F32), (F64, F64)):
            caught = False
            for rule, hyper in rules(eps_mode, False, (1, 0, 0)):
                bucket = tensors(rule, types, (33,), seed=21)
                before = copied(bucket)
                try:
                    caught |= stepped(rule, hyper, bucket) > BOUND[types]
                except AssertionError as error:
                    caught |= "edited a gradient" in str(error)
                assert len(before.param) == 1
            assert caught


def test_broken_spikes_words_and_remainders_are_caught(break_it: Callable[[int], None]) -> None:
    """A spike that enters v whole, words that repeat along a tensor, a remainder of the wrong sign: each is seen."""
    generator = torch.Generator().manual_seed(5)

    def capped() -> bool:
        hyper = Hyper(0.03, 0.9, 1e-3, max_update=1.5)
        bucket = spiked(Rule(), (F32, F32), 1)
        before = copied(bucket)
        cpu.step(Rule(), hyper, bucket)
        return worst(Rule(), hyper, before, bucket) <= BOUND[F32, F32]

    def written(stochastic: bool) -> bool:
        bucket = tensors(Rule(), (torch.bfloat16, F32), (65,), 2)
        bucket = rounded_as(bucket, stochastic=stochastic, compensated=not stochastic, generator=generator)
        before, wide = copied(bucket), twin(bucket)
        cpu.step(Rule(), Hyper(0.03, 0.9, 1e-3), wide)
        cpu.step(Rule(), Hyper(0.03, 0.9, 1e-3), bucket)
        try:
            check_written(bucket, wide, before)
        except AssertionError:
            return False
        return True

    checks = (capped, lambda: written(stochastic=True), lambda: written(stochastic=False))
    assert [check() for check in checks] == [True] * 3
    for i, mistake in enumerate((5, 6, 7)):
        break_it(mistake)
        assert [check() for check in checks] == [k != i for k in range(3)]


@pytest.mark.parametrize(
    ("state_dtype", "dtype"),
    mostly_long(product(STATES, [F32, torch.bfloat16]), lambda i, _: i == 3, unpack=True),
    ids=str,
)
def test_a_state_that_is_narrowed_wrongly_is_caught(
    state_dtype: StateDtype, dtype: torch.dtype, break_it: Callable[[int], None]
) -> None:
    """Rounded to nearest, by the parameter's random bits, before the step, or to another code: each is seen."""

    def right() -> bool:
        bucket = tensors(Rule(), (dtype, F32), (65,), 2)
        if dtype != F32:
            generator = torch.Generator().manual_seed(5)
            bucket = rounded_as(bucket, stochastic=True, compensated=False, generator=generator)
        bucket = narrowed(bucket, state_dtype)
        before, wide = again(bucket), in_float32(bucket)
        for own in (wide, bucket):
            cpu.step(Rule(), Hyper(0.03, 0.9, 1e-3), own)
        try:
            check_narrowed(bucket, wide, before)
        except AssertionError:
            return False
        return True

    assert right()
    for mistake in (13, 14, 15, 16):
        break_it(mistake)
        assert not right(), mistake


def test_broken_clipping_is_caught(break_it: Callable[[int], None]) -> None:
    """A factor left out, decay on the wrong side, unbounded weights, a norm without its last elements."""
    draw = torch.Generator().manual_seed(8)
    p, g = (torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(2))
    rule = Rule()
    off = dict.fromkeys(("clip_value", "clip_norm", "clip_global_norm", "clip_weights"))

    def close(grad: torch.Tensor, bound: float | None = None, **clips: float) -> bool:
        group = {**off, "clip_after_decay": False, "clip_value_last": False, **clips}
        hyper = Hyper(0.1, 0.9, 1e-3, 0.0, 0.5, clip_weights=bound)
        bucket = Bucket([p.clone()], [g], {"square_avg": [torch.zeros_like(p)], "step": [torch.tensor(0.0)]})
        cpu.clip_and_step([(group, rule, hyper, bucket)])
        expected, _ = reference.step(rule, hyper, p.numpy(), grad.numpy(), reference.start(rule, p.numpy()))
        return np.allclose(bucket.param[0].numpy(), expected, rtol=1e-12, atol=0)

    def right() -> list[bool]:
        return [
            close(g * (0.5 / g.norm()), clip_norm=0.5),
            close(g.clamp(-0.3, 0.3), clip_value=0.3),
            close(g, bound=0.7),
            close(g * (0.5 / g.norm()), clip_global_norm=0.5),
        ]

    assert right() == [True] * 4
    for mistake, seen in ((8, [0, 3]), (9, [0, 1, 2, 3]), (10, [2]), (11, [0, 3])):
        break_it(mistake)
        assert [i for i, good in enumerate(right()) if not good] == seen


def test_a_broken_average_is_caught(break_it: Callable[[int], None]) -> None:
    """The shares of the average and of the weights exchanged."""
    hyper = Hyper(0.1, 0.9, 1e-3, average=Averaging(0.9, "tensorflow"))

    def close() -> bool:
        bucket = tensors(Rule(), (F64, F64), (9,), 3)
        bucket.slots["ema"] = [torch.zeros_like(p) for p in bucket.param]
        cpu.step(Rule(), hyper, bucket)
        decay = Averaging(0.9, "tensorflow").decay_at(int(bucket.slots["step"][0]))
        expected = reference.average(decay, bucket.param[0].numpy(), np.zeros(9))
        return np.allclose(bucket.slots["ema"][0].numpy(), expected, rtol=1e-12, atol=0)

    assert close()
    break_it(12)
    assert not close()
