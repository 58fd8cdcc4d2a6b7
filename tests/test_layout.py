"""The floor plan: the order of imports, a docstring per package, and one line [6] outside the bodies."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import rmsprop
from rmsprop import analysis, reference
from rmsprop.spec import EPS_MODES, SLOTS, Hyper, Rule
from rmsprop.tensors.bucket import Bucket

ROOT = Path(rmsprop.__file__).parent
EVERYONE = {"printing", "files", "style", "chart"}  # what has no arrows of its own but to each other

# What each package or top-level module imports of the others.
ARROWS = {
    "printing": set(),
    "files": set(),
    "style": set(),
    "chart": {"style"},
    "spec": set(),
    "reference": {"spec"},
    "analysis": {"spec"},
    "dialects": {"spec"},
    "recipes": {"dialects", "spec"},
    "tensors": {"spec"},
    "kernels": {"tensors", "spec"},
    "settings": {"dialects", "recipes", "tensors", "spec"},
    "state": {"settings", "dialects", "tensors", "spec"},
    "step": {"state", "settings", "kernels", "tensors", "spec"},
    "functional": {"kernels", "settings", "tensors", "spec"},
    "diagnose": {"analysis", "settings", "kernels", "dialects", "tensors", "spec"},
    "optimizer": {"step", "state", "settings", "recipes", "kernels", "diagnose", "tensors", "spec"},
    "in_backward": {"optimizer", "step", "tensors"},
    "translation": {"analysis", "dialects", "spec"},
    "conversion": {"analysis", "settings", "state", "dialects", "spec"},
    "inspection": {"conversion", "diagnose", "optimizer", "analysis", "dialects", "spec"},
    "checkpoint": {"optimizer", "tensors"},
    "memory": {
        "checkpoint",
        "conversion",
        "in_backward",
        "optimizer",
        "kernels",
        "settings",
        "state",
        "tensors",
        "spec",
    },
    "demo": {"optimizer", "diagnose", "analysis", "reference"},
    "race": {"optimizer", "dialects", "spec"},
    "bench": {"optimizer", "kernels"},
}
ABOVE_ALL = {"cli", "__main__"}  # these may import everything, and nothing imports them


def modules() -> Iterator[tuple[str, Path]]:
    """The unit of every module, and its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path != ROOT / "__init__.py":
            yield parts[0], path


def imported(path: Path) -> Iterator[str]:
    """The units that a module imports, wherever in it; imports for type checkers alone are not imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmsprop":
            names = [node.module] if node.module != "rmsprop" else [f"rmsprop.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "rmsprop"]
        else:
            continue
        yield from (name.partition(".")[2].split(".")[0] for name in names)


def test_imports_follow_the_order():
    """A module imports its own package, those below it, and never the package's root."""
    wrong = []
    for unit, path in modules():
        allowed = {unit, *ARROWS.get(unit, set()), *(EVERYONE if unit not in EVERYONE else {"printing", "files"})}
        wrong += [
            f"{path.relative_to(ROOT)} imports {name or 'the root'}"
            for name in imported(path)
            if name not in allowed and unit not in ABOVE_ALL
        ]
    assert wrong == []


def test_the_order_has_no_circle():
    """No unit imports itself by way of others."""
    left = dict(ARROWS)
    while left:
        lowest = {unit for unit, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        left = {unit: below for unit, below in left.items() if unit not in lowest}


def test_every_unit_is_named_and_says_what_it_answers():
    """Each package's docstring begins with one sentence."""
    units = {unit for unit, _ in modules()}
    assert units == {*ARROWS, *ABOVE_ALL}
    for path in ROOT.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert text.split("\n")[0].endswith("."), path


@pytest.mark.parametrize("mode", EPS_MODES)
def test_line_6_is_the_references(mode):
    """The one copy of [6] beside the bodies takes numbers, arrays and tensors, and equals the reference in each."""
    w, eps = np.array([0.0, 1e-12, 0.25, 4.0, 1e8]), 1e-3
    rule, hyper = Rule(eps_mode=mode), Hyper(lr=1.0, alpha=0.0, eps=eps)  # alpha 0: v is g²
    p, _ = reference.step(rule, hyper, np.zeros(5), np.sqrt(w), reference.start(rule, np.zeros(5)))
    expected = np.sqrt(w[1:]) / -p[1:]
    np.testing.assert_allclose(analysis.denominator(mode, eps, w)[1:], expected, rtol=1e-14)
    np.testing.assert_allclose(analysis.denominator(mode, eps, torch.from_numpy(w)).numpy()[1:], expected, rtol=1e-14)
    one_by_one = [analysis.denominator(mode, eps, float(x)) for x in w[1:]]
    by_roots = [analysis.denominator(mode, eps, root=float(np.sqrt(x))) for x in w[1:]]
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-14)
    np.testing.assert_allclose(by_roots, expected, rtol=1e-14)
    with pytest.raises(ValueError, match="'under' is unknown; choose one of outside, inside, both, floor"):
        analysis.denominator("under", eps, 1.0)


def test_line_6_is_computed_in_the_bodies_and_in_analysis_alone():
    """No other module adds ε to a root, or takes the root of a sum with ε."""
    bodies = {"reference.py", "analysis.py", "spec.py", "kernels/eager.py", "kernels/triton_kernel.py"}
    computes = re.compile(
        r"sqrt\(\w+ \+ eps\)|\(\w+ \+ eps\)\.sqrt|sqrt\(\)? ?\+ eps\b|clamp\(min=eps\)|maximum\(\w+, eps\)"
    )
    found = [str(p.relative_to(ROOT)) for _, p in modules() if computes.search(p.read_text())]
    assert set(found) <= bodies


def test_a_bucket_has_the_slots_of_the_spec_in_their_order():
    """However it is made."""
    bucket = Bucket([torch.ones(1)], [torch.ones(1)], {"step": [torch.tensor(0.0)], "square_avg": [torch.ones(1)]})
    for made in (bucket, bucket.part(0, 1), bucket.chosen([0]), bucket.copy(), Bucket()):
        assert tuple(made.slots) == SLOTS
    assert [name for name, values in bucket.chosen([0]).slots.items() if values] == ["square_avg", "step"]


BEGINS = re.compile(r"(What|Whether|Which|How|Where|Who|Those|If|It|Is)\b")
GONE = re.compile(r"\b(is no (tensor|number|map|checkpoint|RMSprop)|are no (files|tensors)|nobody|v_init)\b")


def test_docstrings_begin_with_a_verb_or_a_noun_phrase():
    """Not with a question word, in any module, class or function of the package."""
    wrong = []
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                wrong += [f"{path.relative_to(ROOT)}: {text[:60]}"] if BEGINS.match(text) else []
    assert wrong == []


def test_retired_words_stay_away():
    """The package says "is not a", and uses the present names."""
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for _, p in modules() for m in GONE.finditer(p.read_text())]
    assert found == []
