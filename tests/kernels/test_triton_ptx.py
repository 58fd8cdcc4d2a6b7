"""The Triton kernel as it is compiled for GPUs, on a machine without one: what its PTX and machine code do."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bucket_of, mostly_long
from ptx_machine import Launcher, kept, machine, triton

from rmsprop.kernels import triton as backend
from rmsprop.spec import Averaging, Hyper, Rule, StateDtype
from rmsprop.tensors.bucket import slot_dtype

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F32, F64), (F64, F64), (F64, F32))
RULES = {
    "plain": Rule(),
    "momentum": Rule(momentum=True),
    "centered": Rule(centered=True, momentum=True),
    "full": Rule("both", 0.0, True, True, True, False, "decoupled", True, True),
}
KERNELS = backend.load()
THREAD = backend.BLOCK // (32 * backend.WARPS)  # elements of a block that a thread has, but see Work.bounded


@pytest.fixture(scope="module", autouse=True)
def _fresh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing comes from a cache."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


# How half precision is rounded: by random bits, with what that leaves over.
ROUNDINGS = {"stochastic": (True, False), "compensated": (False, True), "both": (True, True)}


def compiled(
    types: tuple[torch.dtype, torch.dtype],
    rule: Rule,
    capability: int,
    scaled: bool = False,
    capped: bool = False,
    rounding: tuple[bool, bool] = (False, False),
    wall: float | None = None,
    average: Averaging | None = None,
    state_dtype: StateDtype = "float32",
) -> Any:
    """The kernel as a launch would have it compiled; scaled: with GradScaler's tensors and lr on the device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    param, state = types
    one, kept = torch.ones(1, dtype=param), torch.ones(1, dtype=state)
    square = kept.to(slot_dtype("square_avg", param, state_dtype) if state_dtype != "float32" else state)
    words = dict(capturable=scaled, state_dtype=state_dtype)
    bucket = bucket_of([one], [one], [square], [], [], [torch.tensor(0.0)], **words)
    bucket.rounding, bucket.slots["compensation"] = "stochastic" if rounding[0] else "nearest", [one] * rounding[1]
    bucket.slots["ema"] = [kept] * (average is not None)
    kernel = KERNELS.advance
    work = backend.Work(rule, bucket)
    hyper = Hyper(0.1, 0.9, 1e-8, max_update=3.0 if capped else None, clip_weights=wall, average=average)
    fixed = {**work.fixed, **work.extras(hyper)}
    options = {name: fixed.pop(name) for name in ("num_warps", "enable_fp_fusion", "sanitize_overflow")}
    names = ("lr", "alpha", "beta", "log_alpha", "eps", "mu", "wd", "cap", "carried")
    numbers = dict.fromkeys((*names, "wall", "decay", "start", "interval", "early", "value", "last"), "fp64")
    places = ("lr_at", "grad_scale", "found_inf")
    signature = {"table": "*i64", "count": "i32", **numbers}
    fixed["coefficients"] = None
    signature |= dict.fromkeys(places, "*fp32" if scaled else "constexpr") | dict.fromkeys(fixed, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    constants = fixed if scaled else fixed | dict.fromkeys(places)
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(0,): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def operations(ptx: str) -> Counter[str]:
    """How often each instruction occurs."""
    return Counter(re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z][a-z0-9_]*\.[\w.:]+)", ptx, re.M))


@pytest.mark.parametrize(
    ("rule", "types", "capability"),
    mostly_long(
        (
            (rule, types, capability)
            for types, capability in [*((types, 90) for types in TYPES), *((types, 80) for types in TYPES[:2])]
            for rule in RULES
        ),
        lambda i, _: i % 18 == 0,  # other rules beside other types
        unpack=True,
    ),
    ids=lambda x: f"{x[0]}-{x[1]}".replace("torch.", "") if isinstance(x, tuple) else str(x),
)
def test_memory_is_read_16_bytes_at_once_and_nowhere_else(types: tuple, rule: str, capability: int) -> None:
    """Full blocks move in the widest accesses there are; no thread hands anything to another or to local memory."""
    built = compiled(types, RULES[rule], capability, scaled=rule == "full")
    found = operations(built.asm["ptx"])
    vector = 16 // max(t.itemsize for t in types)  # elements in one access, of either dtype
    slots = len(RULES[rule].slots()) - 1
    loads, stores = Counter(), Counter()
    for dtype, read, written in ((types[0], 2, 1), (types[1], slots, slots)):
        width = {16: (".v4.b32", ".v2.b64"), 8: (".v2.b32", ".b64"), 4: (".b32",)}[vector * dtype.itemsize]
        loads[width[dtype.itemsize == 8 and len(width) > 1]] += read * THREAD // vector
        stores[width[dtype.itemsize == 8 and len(width) > 1]] += written * THREAD // vector
    for width, count in loads.items():
        if width.startswith(".v"):
            assert found["ld.global" + width] == count
            assert found["st.global" + width] == stores[width]
        else:  # the table's words and the masked pieces have that width too
            assert found["ld.global" + width] >= count
    assert not [name for name in found if "shared" in name or "local" in name or name.startswith("bar")]
    assert built.metadata.shared == 0


@pytest.mark.parametrize(
    ("types", "rounding"),
    mostly_long(
        product([(BF16, F32), (F16, F16)], ROUNDINGS), lambda _, case: case == ((BF16, F32), "both"), unpack=True
    ),
    ids=str,
)
def test_other_roundings_read_16_bytes_at_once_too(types: tuple, rounding: str) -> None:
    """Random bits are made in registers; a remainder costs one more read and write, as wide as the others."""
    wide = {}
    for how in ((False, False), ROUNDINGS[rounding]):
        built = compiled(types, RULES["full"], 90, scaled=True, capped=True, rounding=how)
        assert built.metadata.shared == 0
        assert built.metadata.num_warps == 2 * backend.WARPS
        found = operations(built.asm["ptx"])
        assert not [name for name in found if "shared" in name or "local" in name or name.startswith("bar")]
        wide[how] = Counter({name: n for name, n in found.items() if ".global.v" in name})
    # eight elements in a thread: as one of 16 bytes, or as two of 8 bytes beside twice as wide a state
    width, accesses = (".v4.b32", 1) if types[1] == F16 else (".v2.b32", 2)
    more = Counter({f"{way}.global{width}": accesses for way in ("ld", "st")})
    assert wide[ROUNDINGS[rounding]] == wide[False, False] + (more if ROUNDINGS[rounding][1] else Counter())


@pytest.mark.parametrize(
    ("types", "scaled"),
    mostly_long(product([(F32, F32), (BF16, F32), (BF16, BF16)], [False, True]), lambda i, _: i == 3, unpack=True),
    ids=str,
)
def test_an_average_is_one_more_read_and_write(types: tuple, scaled: bool) -> None:
    """As wide as those of the other state, in registers, for a block that is full and aligned."""
    wide = []
    for average in (None, Averaging(0.9, "timm")):
        built = compiled(types, RULES["momentum"], 90, scaled=scaled, wall=0.5, average=average)
        assert built.metadata.shared == 0
        found = operations(built.asm["ptx"])
        assert not [name for name in found if "shared" in name or "local" in name or name.startswith("bar")]
        wide.append(Counter({name: n for name, n in found.items() if ".global.v" in name}))
    count = THREAD * types[1].itemsize // 16
    more = Counter({f"{way}.global.v4.b32": count for way in ("ld", "st")})
    assert wide[1] == wide[0] + more


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "state_dtype"), [*product([F32, BF16, F16], ["bfloat16", "float8"])], ids=str)
def test_state_of_fewer_bytes_is_read_beside_its_parameter(dtype: torch.dtype, state_dtype: StateDtype) -> None:
    """As many elements at once as 16 bytes of the parameter have; a thread has half as many, and exchanges none."""
    built = compiled((dtype, F32), RULES["centered"], 90, state_dtype=state_dtype)
    assert built.metadata.shared == 0
    assert built.metadata.num_warps == 2 * backend.WARPS
    found = operations(built.asm["ptx"])
    assert not [name for name in found if "shared" in name or "local" in name or name.startswith("bar")]
    square = slot_dtype("square_avg", dtype, state_dtype)
    loads, stores, vector = Counter(), Counter(), 16 // dtype.itemsize
    for kind, read, written in ((dtype, 2, 1), (square, 1, 1), (BF16, 2, 2)):
        width = {16: ".v4.b32", 8: ".v2.b32", 4: ".b32"}[vector * kind.itemsize]
        loads[width] += read * THREAD // 2 // vector
        stores[width] += written * THREAD // 2 // vector
    for way, counts in (("ld.global", loads), ("st.global", stores)):
        wide = {width: n for width, n in counts.items() if width.startswith(".v")}
        assert {width: found[way + width] for width in wide} == wide
        assert all(found[way + width] >= n for width, n in counts.items())


@pytest.mark.long
def test_what_is_off_costs_nothing() -> None:
    """Without bound, random bits and remainder the code has no instruction of theirs; each of them adds its own."""

    def counted(capped: bool, how: tuple[bool, bool]) -> tuple[int, int, int]:
        found = operations(compiled((BF16, F32), RULES["plain"], 90, capped=capped, rounding=how).asm["ptx"])
        loads = sum(n for name, n in found.items() if "ld.global" in name)
        return found["mul.lo.s32"], found["setp.gt.f32"], loads

    off, bound = counted(False, (False, False)), counted(True, (False, False))
    words, both = counted(False, (True, False)), counted(False, (True, True))
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    assert off[:2] == (2 if version < (3, 9) else 3, 0)  # products, for the table's columns
    assert (bound[0], bound[2]) == (off[0], off[2])
    assert bound[1] > 0
    assert words[0] > off[0] + 2 * THREAD // 2  # two for each of half as many elements
    assert words[1] == 0
    assert both[2] > words[2]


@pytest.mark.parametrize("types", mostly_long(TYPES, lambda _, types: types == (BF16, F32)), ids=str)
def test_rounding_is_ieee(types: tuple) -> None:
    """Root and division round to nearest, subnormals are kept, products are fused into sums where the source says.

    That is, for each element, and so for each division, in l2's [1], [2] and [9]; and in [3], [5] and [8] twice.
    """
    for name, fused in (("plain", 3), ("full", 6)):
        found = operations(compiled(types, RULES[name], 90, scaled=name == "full").asm["ptx"])
        number = "f64" if types[0] == F64 else "f32"
        assert found[f"sqrt.rn.{number}"] > 0
        assert found[f"div.rn.{number}"] > 0
        # [4] on the device is libdevice's exponential and logarithm in float64, which are made of these
        libdevice = {"fma.rn.f64", "abs.ftz.f32", "rcp.approx.ftz.f64"} if name == "full" else set()
        assert found["fma.rn.f32"] == (0 if types[0] == F64 else fused * found["div.rn.f32"])
        inexact = {x for x in found if "approx" in x or "ftz" in x or "div.full" in x or x.startswith("fma")}
        inexact -= {"fma.rn.f32"}
        assert inexact <= libdevice


def resources(built: Any, folder: Path) -> dict[str, int]:
    """The registers of a thread, and the bytes of its stack and local memory."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(binary) if binary.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("this triton brings no cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


@pytest.mark.parametrize("rule", mostly_long(RULES, lambda _, rule: rule == "plain"))
def test_registers_suffice(rule: str, tmp_path: Path) -> None:
    """Nothing spills, and 16 warps fit a multiprocessor, but for the rule that has everything.

    With random bits, remainder and bound they fit too, and at most four numbers spill.
    """
    for types in TYPES[:3]:
        for how in ((False, False), *([(True, True)] if types[0] == BF16 else [])):
            built = compiled(types, RULES[rule], 90, scaled=rule == "full", capped=any(how), rounding=how)
            words = resources(built, tmp_path)
            assert words["LOCAL"] == 0
            assert words["STACK"] <= (16 if any(how) else 0), (types, how, words)
            assert words["REG"] <= (168 if rule == "full" and not any(how) else 128), (types, how, words)


@pytest.mark.long
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float8"])
def test_registers_suffice_for_state_of_fewer_bytes(state_dtype: StateDtype, tmp_path: Path) -> None:
    """Nothing spills, and a block of 16 warps fits a multiprocessor, also with random bits, remainder and bound."""
    for rule, dtype, how in product(RULES, (F32, BF16), ((False, False), (True, True))):
        if dtype == BF16 or not any(how):
            words = dict(scaled=rule == "full", capped=any(how), rounding=how, state_dtype=state_dtype)
            found = resources(compiled((dtype, F32), RULES[rule], 90, **words), tmp_path)
            assert (found["LOCAL"], found["STACK"]) == (0, 0), (rule, dtype, how, found)
            assert found["REG"] <= 128, (rule, dtype, how, found)


@pytest.fixture
def h100() -> Iterator[type[Launcher]]:
    with machine(KERNELS.advance, KERNELS.count_steps) as launcher:
        yield launcher


@pytest.mark.parametrize(
    ("scaled", "dtype", "how"),
    mostly_long(
        [
            (False, F32, (False, False)),
            (True, F32, (False, False)),
            (False, BF16, (True, True)),
            (True, F16, (True, True)),
        ],
        lambda i, _: i == 0,
        unpack=True,
    ),
)
def test_a_launch_compiles_to_the_same(
    scaled: bool, dtype: torch.dtype, how: tuple[bool, bool], h100: type[Launcher]
) -> None:
    """What `launch` hands to Triton, from Python's numbers and tensors, is what these tests compile and look at."""
    one = torch.ones(5, dtype=dtype)
    bucket = bucket_of([one], [one], [one], [one], [one], [torch.tensor(0.0)], capturable=scaled)
    bucket.rounding, bucket.slots["compensation"] = "stochastic" if how[0] else "nearest", [one] * how[1]
    bucket.random_keys = [(1 << 64) - 1] * how[0]
    rule = RULES["full"]
    table = backend.Table((5,), torch.device("cpu"))
    table.update(bucket)
    scale = torch.tensor(1.0) if scaled else None
    lr = torch.tensor(0.1) if scaled else 0.1
    hyper = Hyper(lr, 0.9, 1e-8, 0.9, 0.0, max_update=3.0 if any(how) else None)
    with kept(h100) as launches:
        backend.Work(rule, bucket).launch(hyper, table, scale, scale)
    assert [launch.kernel.name for launch in launches] == ["count_steps"] * scaled + ["advance"]
    expected = compiled((dtype, dtype), rule, 90, scaled, any(how), how)
    assert operations(launches[-1].kernel.ptx) == operations(expected.asm["ptx"])
    assert launches[-1].kernel.threads == 32 * backend.WARPS * (2 if any(how) else 1)
    assert expected.metadata.num_warps * 32 == launches[-1].kernel.threads


@pytest.mark.parametrize(
    ("rule", "capturable"), mostly_long(product(["plain", "full"], [False, True]), lambda i, _: i == 1, unpack=True)
)
def test_later_launches_skip_tritons_search(rule: str, capturable: bool, h100: type[Launcher]) -> None:
    """They hand the driver what Triton's own way does, with today's numbers; other dtypes get a kernel of theirs."""
    one = torch.ones(5)
    bucket = bucket_of([one], [one], [one], [one], [one], [torch.tensor(0.0)], capturable=capturable)
    table = backend.Table((5,), torch.device("cpu"))
    table.update(bucket)
    work = backend.Work(RULES[rule], bucket)

    def launched(hyper: Hyper, *scaling: torch.Tensor) -> list[Any]:
        with kept(h100) as launches:
            work.launch(hyper, table, *scaling)
        assert len(launches) == (2 if work.counted_before(work.extras(hyper)) else 1)
        return launches

    plain = Hyper(0.1, 0.9, 1e-8, 0.9 if work.rule.momentum else 0.0)
    scaling = (torch.tensor(2.0), torch.tensor(0.0))
    calls = [
        (plain,),
        (replace(plain, lr=torch.tensor(0.1)), *scaling),
        (replace(plain, lr=torch.tensor(0.1, dtype=F64)), *scaling),
        (replace(plain, max_update=2.0),),
    ]
    found = [launched(*call) for call in calls]
    assert len({id(launches[-1].kernel) for launches in found}) == len(calls)
    with pytest.MonkeyPatch.context() as never:
        for kernel in (KERNELS.advance, KERNELS.count_steps):
            never.setattr(kernel, "run", None)
        assert [launched(*call) for call in calls] == found
        moved = launched(replace(plain, lr=0.2))[-1]
    first, lr = found[0][-1], KERNELS.advance.arg_names.index("lr")
    assert (first.args[lr], moved.args[lr]) == (0.1, 0.2)
    assert replace(moved, args=first.args) == first
    assert (moved.args[:lr], moved.args[lr + 1 :]) == (first.args[:lr], first.args[lr + 1 :])


@pytest.mark.long
def test_every_rule_compiles() -> None:
    """Each switch of the spec, in float32, is Triton that compiles."""
    for eps_mode in ("outside", "inside", "both", "floor"):
        for rule in (Rule(eps_mode, lr_in_buffer=True, momentum=True), Rule(eps_mode, bias_correction=True)):
            assert compiled((F32, F32), rule, 90, capped=rule.lr_in_buffer).asm["cubin"]


def test_counting_compiles() -> None:
    """So does the launch that counts steps before [4] reads them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS.count_steps
    signature = {"table": "*i64", "count": "i32", "found_inf": "*fp32", "clock": "constexpr", "block": "constexpr"}
    options = {"enable_fp_fusion": False}  # Triton 3.9 warns where it is left open
    constants = {(3,): triton.language.float32, (4,): 256}
    source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
