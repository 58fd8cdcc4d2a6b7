"""Every dialect against the real framework: what it computed, step by step, with the learning rate changing."""

import pytest
import torch
from recorded import Recorded, difference, frameworks, ours, parameters, provenance, recorded, refused

from rmsprop import RMSprop
from rmsprop.dialects import DIALECTS

CASES = list(recorded())
assert CASES, "no golden vectors were found"

# Frameworks that do not install beside Python 3.11 and an x86-64 CPU; their rows come from their sources.
NOT_RECORDED = {
    "textbook", "hinton2012", "graves2013", "dqn2015", "a3c2016",  # papers
    "mxnet2", "lasagne", "blocks", "climin", "caffe", "caffe2", "torch7", "flux", "dl4j", "neon",
}  # fmt: skip


def _spread() -> set[tuple[int, str]]:
    """Deal few runs to the backends: of each dialect each word's value and each dtype, of each framework several."""
    seen: set[object] = set()
    kept: set[tuple[int, str]] = set()
    for backend, runs in (("cpu", CASES), ("eager", CASES[::-1])):
        for case in runs:
            about = {
                (case.framework, case.dialect, case.dtype, backend),
                *((case.dialect, word, str(value)) for word, value in case.words.items()),
                *((case.dialect, len(case.words), bool(refused(case)), backend),),
            }
            if not about <= seen:
                seen |= about
                kept.add((CASES.index(case), backend))
    return kept


SPREAD = _spread()


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, marks=[] if (i, backend) in SPREAD else pytest.mark.long)
        for i, case in enumerate(CASES)
        for backend in ("cpu", "eager")
    ],
    ids=str,
)
def test_a_dialect_computes_what_its_framework_computed(case: Recorded, backend: str):
    """float64 to 1e-11, float32 to 1e-5, relative, at every element of 25 steps; or the recorded exception."""
    start, run = parameters(), case.run()
    for t, params in ours(case, backend=backend):
        for name, actual in params.items():
            off = difference(actual, run[name][t], start[name])
            assert off <= case.rtol, f"step {t}, {name}: {off:.3g} off"


def test_every_dialect_is_recorded_or_says_why_not():
    """A new row asks for a golden vector."""
    have = {case.dialect for case in CASES}
    assert have | NOT_RECORDED == set(DIALECTS)
    assert not have & NOT_RECORDED


@pytest.mark.parametrize("framework", frameworks())
def test_golden_vectors_say_where_they_come_from(framework: str):
    """Versions, command and date."""
    about = provenance(framework)
    assert about["versions"]
    assert "make_" in about["command"]
    assert about["date"].startswith("20")


def test_the_runs_cover_what_they_should():
    """Centered or not, momentum or none, weight decay, Nesterov, both dtypes: whatever the framework has."""
    for dialect in sorted({case.dialect for case in CASES}):
        runs = [case for case in CASES if case.dialect == dialect]
        assert {case.dtype for case in runs} >= {"float32"}
        if "grad_avg" in DIALECTS[dialect].states.values() and not DIALECTS[dialect].rule.centered:
            word = DIALECTS[dialect].argument("centered")
            assert {bool(case.words.get(word, False)) for case in runs} == {False, True}, dialect


@pytest.mark.parametrize("case", [case for case in CASES if refused(case)], ids=str)
def test_what_a_framework_ignores_is_refused_here(case: Recorded):
    """One sentence names the word; the run without it is the framework's."""
    word = refused(case)[0]
    given = {**case.words, case.lr_word: 0.1}
    with pytest.raises((TypeError, ValueError), match=word):
        RMSprop([torch.nn.Parameter(torch.ones(1))], dialect=case.dialect, **given)


@pytest.mark.parametrize(
    "wrong", [{"lr_in_buffer": False}, {"eps_mode": "outside"}, {"square_avg_init": 0.0}], ids=str
)
def test_a_wrong_rule_is_noticed(wrong: dict[str, object]):
    """The same comparison fails by far where ε, the learning rate or the start is elsewhere."""
    start, worst = parameters(), 0.0
    for case in CASES:
        if case.dialect == "tensorflow1" and case.words.get("momentum") and case.dtype == "float64":
            run = case.run()
            offs = (
                difference(actual, run[name][t], start[name])
                for t, params in ours(case, **wrong)
                for name, actual in params.items()
            )
            worst = max(worst, *offs)
    assert worst > 1e-5, "float64 runs agree to 1e-11"
