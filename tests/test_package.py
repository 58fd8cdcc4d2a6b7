"""The package as a whole: its imports, the rules for its files, and its README."""

import ast
import re
import subprocess
import sys

import pytest
from paths import ROOT

import rmsprop

SOURCES = sorted((ROOT / "src" / "rmsprop").rglob("*.py"))
HEAVY = ("matplotlib", "rich", "typer", "sklearn", "PIL", "pandas", "torch._dynamo", "torch._inductor")


def fresh(code):
    """Return the output of a new process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_nothing_heavy():
    """`import rmsprop` imports no torch, optimizer and races no plotting or printing library.

    torch.distributed.tensor costs a second, and where it was not imported there is no DTensor. Triton is imported
    when a GPU asks for it, and a missing one is a reason. One process checks all, since it takes seconds to start.
    """
    loaded, reason = fresh("""if True:
        import sys, rmsprop
        assert not {"torch", "numpy"} & set(sys.modules)
        import torch
        had = set(sys.modules)
        import rmsprop.kernels, rmsprop.optimizer, rmsprop.race.landscapes
        from rmsprop.tensors import bucket, shards
        print(*set(sys.modules) - had)
        class Own(torch.Tensor): pass
        x = torch.ones(3).as_subclass(Own)
        assert not shards.is_dtensor(x) and shards.shard(x) is x
        own = bucket.Bucket(param=[x], grad=[x])
        assert shards.localized(own) is own and len(shards.norms(own)) == 1
        assert "torch.distributed.tensor" not in sys.modules, "imported"
        assert "triton" not in sys.modules, "imported"
        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        rmsprop.RMSprop([p]).step()
        assert "rmsprop.kernels.triton_kernel" not in sys.modules, "imported"
        sys.modules["triton"] = None
        from rmsprop.kernels import triton
        print(triton.load())
    """).splitlines()
    assert not [name for name in loaded.split() if name.startswith(HEAVY)]
    assert "Triton cannot be imported" in reason
    assert "pip install triton" in reason


def test_the_command_line_shows_help_without_torch():
    """`rmsprop --help` does not wait for torch."""
    code = "import sys; sys.argv = ['rmsprop', '--help']\ntry:\n    from rmsprop.__main__ import main; main()\n"
    assert fresh(code + "except SystemExit:\n    print('torch' in sys.modules)").endswith("False")


def test_without_its_extra_the_command_line_says_what_it_needs():
    """A missing typer is one sentence, not a traceback."""
    code = "import sys; sys.modules['typer'] = None\nfrom rmsprop.__main__ import main\n"
    code += "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code)"
    assert fresh(code) == "The command line needs typer: pip install 'rmsprop[cli]'"


def test_public_names_are_there_and_a_wrong_one_says_so():
    """Every name in __all__ resolves, and dir() lists them."""
    for name in rmsprop.__all__:
        assert getattr(rmsprop, name) is not None
    assert set(rmsprop.__all__) <= set(dir(rmsprop))
    with pytest.raises(AttributeError, match="no attribute 'Adam'; it offers ConversionReport, DIALECTS, Estimate"):
        _ = rmsprop.Adam


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "rmsprop" / "csrc").glob("*")), ids=lambda path: path.name)
def test_a_source_file_of_the_kernel_is_short_too(path):
    """A file has under 400 lines, and its first line describes it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400
    assert lines[0].startswith("// ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_source_file_is_short_documented_and_reads_no_environment(path):
    """A module has under 460 lines, docstrings for itself and all public names, and no os.environ."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 460
    assert "environ" not in text
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    public = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    overloads = {node for node in public if any("overload" in ast.unparse(d) for d in node.decorator_list)}
    missing = [node.name for node in public if node not in overloads and not ast.get_docstring(node)]
    assert not missing


def test_production_does_not_import_the_judge_and_imports_point_one_way():
    """Nothing imports reference; the optimizer imports no command or figure; kernels do not refer to dialects."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT / "src" / "rmsprop").as_posix()
        assert not re.search(r"import.*\breference\b", text) or name == "reference.py", name
        if name == "optimizer.py" or name.startswith(("settings/", "state/", "tensors/", "kernels/")):
            assert not re.search(r"^\s*(from|import) rmsprop.*\b(cli|demo|race|bench|figure|style)\b", text, re.M), (
                name
            )
        if name.startswith("kernels/"):
            assert "dialect" not in text, name


def test_every_body_carries_the_numbers_of_the_equation():
    """[1]..[9] are in the spec, the reference, the eager body, and the two kernels."""
    for name in ("spec.py", "reference.py", "kernels/eager.py", "kernels/triton_kernel.py", "csrc/lines.h"):
        text = (ROOT / "src" / "rmsprop" / name).read_text(encoding="utf-8")
        assert all(f"[{i}]" in text for i in range(1, 10)), name


def blocks(path):
    """Return the Python code blocks of a page as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S))


def test_the_readme_runs_and_prints_what_its_comments_say(capsys):
    """The code blocks run in order, and each print is followed by its output."""
    program = blocks(ROOT / "README.md")
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    promised = re.findall(r"print\(.*?\)\s*#?\s*(?:\n\s*)?# ?(.*)", program.replace("  # -", "\n# -"))
    assert len(printed) == 1
    assert [line.strip() for line in promised] == printed


def test_the_readme_is_one_screen_after_another_and_counts_right():
    """At most 120 lines, one picture, and the numbers of recipes and of dialects beside the nine named."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert text.count("![") == 1
    assert f"[{len(rmsprop.DIALECTS) - 9} more](docs/dialects.md)" in " ".join(text.split())
    assert f"[{len(rmsprop.RECIPES)} published settings](docs/recipes.md)" in " ".join(text.split())


@pytest.mark.parametrize("name", ["README", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT"])
def test_links_of_the_root_lead_somewhere(name):
    """Every file that a page of the root links to exists."""
    text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" in target or (ROOT / target.partition("#")[0]).exists(), target


def test_the_signature_example_in_the_docstring_is_true():
    """RMSprop's docstring runs."""
    import doctest

    from rmsprop import optimizer

    assert doctest.testmod(optimizer).failed == 0
    assert doctest.testmod(optimizer).attempted > 0
