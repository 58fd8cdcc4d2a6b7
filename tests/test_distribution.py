"""What would be published: the files of the wheel and of the sdist, the version, and the systems that are refused."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cases import mostly_long
from paths import ROOT

GIT = shutil.which("git")
VERSION = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
HOSTS = (".github/", ".ci/", ".gitignore", ".pre-commit-config.yaml")  # what a host of the repository reads


def tracked() -> list[str]:
    """The files of the repository, relative to it."""
    command = [str(GIT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in found.split("\0") if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it where no compiler can be found."""
    if GIT is None or not (ROOT / ".git").exists():
        pytest.skip("needs the repository, to know its files")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, env={**os.environ, "CC": "false", "CXX": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.long
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    """Every module, the live page, the mark of types and the license; no source of the kernel, no test, no data."""
    (wheel,) = built.glob("*.whl")
    assert re.fullmatch(rf"rmsprop-{VERSION[0]}-py3-none-(?!any).+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    info = f"rmsprop-{VERSION[0]}.dist-info/"
    about = {name.removeprefix(info) for name in names if name.startswith(info)}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    held = re.compile(r"src/.*(\.py|py\.typed|race/[^/]+\.(js|css|html))$")
    modules = {name.removeprefix("src/") for name in tracked() if held.match(name)}
    assert {name for name in names if not name.startswith(info)} == modules
    assert {"rmsprop/py.typed", "rmsprop/race/engine.js"} <= modules


@pytest.mark.long
def test_the_sdist_holds_the_repository(built: Path) -> None:
    """Every file but those for a host, so that the tests run from it; and what the build adds, the metadata."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    added = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert found - added == {name for name in tracked() if not name.startswith(HOSTS)}
    assert sdist.stat().st_size < 8 << 20


def test_the_version_is_in_one_place() -> None:
    """pyproject.toml has it; no module repeats it, and CHANGELOG has a heading for it."""
    assert len(VERSION) == 1
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "setup.py", ROOT / "CITATION.cff"]
    assert [path.name for path in sources if f'"{VERSION[0]}"' in path.read_text(encoding="utf-8")] == []
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(VERSION[0])}, (unreleased|\d{{4}}-\d{{2}}-\d{{2}})$", changes, re.MULTILINE)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository with the release script, on main."""
    if GIT is None or sys.platform == "win32":
        pytest.skip("needs git and a shell")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A Maintainer")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "maintainer@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0, unreleased\n\n## 0.1.0, 2020-01-01\n")
    for command in ("init --quiet --initial-branch main", "add .", "commit --quiet --message Start"):
        subprocess.run([GIT, *command.split()], cwd=tmp_path, check=True)
    return tmp_path


def release(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Run the release command."""
    return subprocess.run([".ci/release", version], cwd=folder, capture_output=True, text=True)


def test_a_release_dates_the_changelog_and_tags(repository: Path) -> None:
    """One command: today's date in the heading, one commit, one tag, and the command that publishes them."""
    done = release(repository, "0.2.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Publish it with: git push --atomic origin main v0.2.0\n"
    changes = (repository / "CHANGELOG.md").read_text()
    assert re.search(r"^## 0\.2\.0, \d{4}-\d{2}-\d{2}$", changes, re.MULTILINE)
    assert "## 0.1.0, 2020-01-01\n" in changes
    shown = subprocess.run([GIT, "log", "-1", "--format=%s %D"], cwd=repository, capture_output=True, text=True)
    assert shown.stdout == "Release 0.2.0 HEAD -> main, tag: v0.2.0\n"
    assert release(repository, "0.2.0").returncode == 1


@pytest.mark.parametrize(
    ("prepare", "version", "reason"),
    mostly_long(
        [
            ("touch new", "0.2.0", "the working tree has changes"),
            ("true", "0.3.0", 'pyproject.toml has version = "0.2.0", not 0.3.0'),
            ("git checkout -qb side", "0.2.0", "the branch is side"),
            ("git tag v0.2.0", "0.2.0", "the tag v0.2.0 exists"),
            (
                "sed -i s/,.unreleased/,now/ CHANGELOG.md && git commit -qam x",
                "0.2.0",
                "has no heading '## 0.2.0, unrel",
            ),
        ],
        lambda i, _: i < 2,
        unpack=True,
    ),
)
def test_a_release_is_refused_before_anything_changes(
    repository: Path, prepare: str, version: str, reason: str
) -> None:
    """One sentence, no commit and no date."""
    subprocess.run(prepare, shell=True, cwd=repository, check=True)
    before = (repository / "CHANGELOG.md").read_text()
    done = release(repository, version)
    assert done.returncode == 1
    assert reason in done.stderr
    assert (repository / "CHANGELOG.md").read_text() == before


@pytest.mark.parametrize(
    ("libc", "refused"),
    mostly_long([("x86_64-pc-linux-musl", True), ("x86_64-pc-linux-gnu", False)], lambda i, _: i == 0, unpack=True),
)
def test_musl_is_refused_with_the_reason(libc: str, refused: bool) -> None:
    """torch has no wheel for it: the build ends with a sentence that names a system that works."""
    code = f"""if True:
        import runpy, sys, sysconfig, setuptools
        sysconfig.get_config_var = lambda name: {libc!r}
        compile = lambda command: command(setuptools.Distribution()).run() or print("built")
        setuptools.setup = lambda cmdclass, **_: compile(cmdclass["build_ext"])
        runpy.run_path("setup.py")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == refused
    assert ("needs torch, which has no wheel for musl" in done.stderr) == refused
    assert done.stdout == ("" if refused else "built\n")
