"""The files that a host of the repository reads: workflows, templates, hooks. `make check` lints them."""

import re

import pytest
from paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="an sdist, without the files for a host")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_is_pinned_and_a_job_has_the_rights_it_names(path):
    """Each action has a commit and the version in words; no right is given to a whole workflow, or to write code."""
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) or action.startswith("./"), action
    assert "\npermissions: {}\n" in text
    assert set(re.findall(r"(\w[\w-]*): write", text)) <= {"id-token", "pages"}
    jobs = re.split(r"^  (?=[\w-]+:$)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]
    assert jobs
    for job in jobs:
        assert "\n    permissions:\n" in job
        assert "\n    timeout-minutes: " in job or "\n    uses: " in job
    assert text.count("uses: actions/checkout@") == text.count("persist-credentials: false")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_comes_with_the_output_of_check(path):
    """Versions, devices and backends are asked for before anyone has to."""
    assert "`rmsprop check`" in path.read_text(encoding="utf-8")


def test_hooks_run_the_versions_that_make_check_runs():
    """What pre-commit installs is what pyproject.toml asks for."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'additional_dependencies: \["(.+)"\]', hooks)
    assert {re.split(r"[<>=]", name)[0] for name in found} == {"ruff", "zizmor", "check-jsonschema"}
    assert all(f'"{name}"' in wanted for name in found)


def test_the_oldest_versions_that_are_promised_are_tested():
    """The lowest torch, Python and NumPy of pyproject.toml are those of one job."""
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.findall(r'^requires-python = ">=(.+)"$', wanted, re.MULTILINE)
    torch, numpy = (re.findall(rf'"{name}>=([\d.]+)"', wanted)[0] for name in ("torch", "numpy"))
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f'python: "{python[0]}", torch: "torch=={torch}.* numpy=={numpy}.*"' in tests
