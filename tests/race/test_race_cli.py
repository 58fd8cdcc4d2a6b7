"""`rmsprop race` from the command line to the files, and the contents of the files."""

import re
from pathlib import Path

import numpy as np
import pytest
import typer
from cases import mostly_long
from PIL import Image
from typer.testing import CliRunner, Result

from rmsprop.cli.race import race as command
from rmsprop.files import write_whole
from rmsprop.race.figures import FRAMES, _draw, animation, figure, moments, surface
from rmsprop.race.landscapes import LANDSCAPES, OPTIMIZERS, race
from rmsprop.race.page import page
from rmsprop.style import LOOKS

app = typer.Typer()
app.command("race")(command)
app.callback()(lambda: None)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["race", *words], env={"COLUMNS": "120", "NO_COLOR": "1"})


def plain(text: str) -> str:
    """Return a text without the boxes and line breaks that depend on the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─┃]", " ", text).split())


@pytest.fixture(scope="module", params=[10, pytest.param(60, marks=pytest.mark.long)])
def steps(request: pytest.FixtureRequest) -> int:
    """The length of the race that is drawn."""
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, steps: int) -> Path:
    """Write every kind of file of one race with all optimizers to a directory."""
    folder = tmp_path_factory.mktemp("race")
    runs = race("ravine", list(OPTIMIZERS), steps=steps)
    for draw, kind in ((figure, "png"), (animation, "gif"), (animation, "webp"), (page, "html")):
        draw(LANDSCAPES["ravine"], runs, folder / f"ravine.{kind}")
    return folder


@pytest.mark.parametrize("words", mostly_long([["--steps", "40"], []], lambda i, _: i == 0), ids=["short", "whole"])
def test_default_race_prints_a_table_and_writes_three_files(words: list[str], tmp_path: Path) -> None:
    """`rmsprop race` prints every entrant's result and writes a PNG, a GIF and a page, whose paths it prints."""
    result = run(*words, "--out", str(tmp_path / "new" / "folder"))
    assert result.exit_code == 0, result.output
    for said in ("SGD", "SGD momentum", "Adam", "RMSprop", "step 32", "never", "distance to minimum"):
        assert said in result.output
    left = "SGD momentum" if words else "RMSprop"  # of those that reached the target
    assert f"\n{left}: above the target again at the end; a falling lr lets it settle" in result.output
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["ravine.gif", "ravine.html", "ravine.png"]
    assert result.output.count("wrote ") == 3


def test_options_reach_the_race(tmp_path: Path) -> None:
    """Condition, optimizers, steps, rates, start, and format take effect."""
    words = ["--condition", "1000", "--optimizers", "sgd, rmsprop-textbook", "--steps", "30"]
    words += ["--lr", "sgd=0.1,rmsprop-textbook=0.2", "--start", "-3,0.5", "--format", "png", "--out", str(tmp_path)]
    result = run("ravine", *words)
    assert result.exit_code == 0, result.output
    assert "(x² + 1000 y²)/2" in result.output
    assert "diverged at step" in result.output
    assert re.search(r"RMSprop textbook\W+0\.2\W", result.output)
    assert "Adam" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ravine.png"]


@pytest.mark.long
def test_all_races_every_landscape(tmp_path: Path) -> None:
    """`rmsprop race all` draws each landscape of the table."""
    result = run("all", "--steps", "5", "--format", "png", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(LANDSCAPES)


def test_all_gives_the_condition_to_the_ravines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rmsprop race all --condition` sets the condition of each ravine and races the other landscapes as they are."""
    for name in [name for name in LANDSCAPES if name not in ("ravine", "beale")]:
        monkeypatch.delitem(LANDSCAPES, name)
    result = run("all", "--condition", "1000", "--steps", "5", "--format", "png", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "(x² + 1000 y²)/2" in result.output
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["beale", "ravine"]


def test_list_names_everything_and_writes_nothing(tmp_path: Path) -> None:
    """--list shows every landscape and optimizer, and stops there."""
    result = run("--list", "--out", str(tmp_path / "none"))
    assert result.exit_code == 0, result.output
    for name in (*LANDSCAPES, *OPTIMIZERS):
        assert name in result.output
    assert not (tmp_path / "none").exists()


def test_help_explains_with_examples() -> None:
    """--help names every option and shows examples that are commands."""
    text = plain(run("--help").output)
    for option in ("condition", "optimizers", "steps", "lr", "start", "seed", "out", "format", "list"):
        assert f"--{option}" in text
    assert "rmsprop race ravine --condition 1000 --lr 0.1" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hill"], "landscape='hill' is unknown; choose one of ravine,"),
        (["beale", "--condition", "5"], "condition=5 has no meaning on 'beale'"),
        (["--condition", "0.5"], "condition=0.5: the steep curvature over the flat one is a number from 1"),
        (["--optimizers", "adagrad"], "--optimizers: 'adagrad' is unknown; choose from sgd,"),
        (["--optimizers", ","], "--optimizers ',' names nothing"),
        (["--steps", "0"], "steps=0: on ravine give a whole number from 1 to 2000."),
        (["--lr", "-1"], "lr=-1.0 for sgd: a learning rate is a positive finite number"),
        (["--lr", "nan"], "lr=nan for sgd"),
        (["--lr", "fast"], "--lr: 'fast' is not a number; write it like 0.001."),
        (["--lr", "sgd=0.1,0.2"], "not a mixture"),
        (["--lr", "adm=0.1"], "lr is given for 'adm', which is not in this race"),
        (["--start", "3"], "--start '3': give two numbers with a comma between them"),
        (["--start", "1,2,3"], "give two numbers"),
        (["--start", "a,b"], "'a' is not a number"),
        (["--start", "0,0"], "start=0,0 is a minimum of ravine"),
        (["--seed", "-1"], "seed=-1: give a whole number"),
        (["--format", "mp4"], "--format: 'mp4' is unknown; choose from png, gif, webp, html."),
        (["--format", ""], "--format '' names nothing"),
    ],
)
def test_mistakes_end_with_a_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    """A mistake ends with exit code 2, one sentence on stderr, no traceback and no file."""
    result = run(*words, "--out", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert sentence in plain(result.stderr)
    assert "Traceback" not in result.output
    assert not (tmp_path / "none").exists()


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    """A directory that cannot be created gives one sentence, too."""
    (tmp_path / "file").write_text("in the way")
    result = run("--steps", "2", "--format", "png", "--out", str(tmp_path / "file" / "folder"))
    assert result.exit_code == 2
    assert "cannot be written" in plain(result.stderr)


def test_png_is_an_image(made: Path) -> None:
    """The PNG opens and is large enough for a slide."""
    with Image.open(made / "ravine.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 1000


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animation_moves_repeats_and_rests(made: Path, steps: int, kind: str) -> None:
    """The animation has one frame per moment, repeats forever, rests on its last frame and stays below 3 MB."""
    path = made / f"ravine.{kind}"
    with Image.open(path) as image:
        frames, pauses = [], []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(image.convert("RGB").tobytes())
            pauses.append(image.info["duration"])
        assert image.format == kind.upper()
        assert image.info["loop"] == 0
    assert len(frames) == steps + 1
    assert len(set(frames)) == steps + 1
    assert pauses[-1] > 10 * pauses[0]
    assert path.stat().st_size < 3_000_000


def test_gif_keeps_its_colors(made: Path) -> None:
    """Every optimizer's color, and the star's, survives the GIF's palette within an invisible difference."""
    with Image.open(made / "ravine.gif") as image:
        image.seek(image.n_frames - 1)
        colors = [color for _, color in image.convert("RGB").getcolors(1 << 20)]
    star = "#F0E442"
    for code in (star, *(look.color for look in LOOKS.values())):
        wanted = bytes.fromhex(code[1:])
        assert min(max(abs(a - b) for a, b in zip(color, wanted, strict=True)) for color in colors) <= 8


@pytest.mark.parametrize("steps", [1, 20, 61, 500, 2000])
def test_moments_thin_the_frames(steps: int) -> None:
    """Frames are few, evenly spaced by a round number, and always include the first and the last step."""
    shown = moments(race("d2l", ["sgd"], steps=steps))
    assert shown[0] == 0
    assert shown[-1] == steps
    assert len(shown) <= FRAMES + 2
    assert len(set(np.diff(shown[:-1]))) <= 1


def test_looks_are_distinct() -> None:
    """Every optimizer has a look, and no two share a color, a dash, or a marker."""
    assert set(LOOKS) == set(OPTIMIZERS)
    for part in ("color", "dash", "marker", "sign"):
        assert len({getattr(look, part) for look in LOOKS.values()}) == len(LOOKS)


def test_everything_diverged_still_draws(tmp_path: Path) -> None:
    """A race in which all diverge at the first step is drawn like any other."""
    runs = race("ravine", lr=1e300, steps=5)
    for draw, kind in ((figure, "png"), (animation, "webp"), (page, "html")):
        assert draw(LANDSCAPES["ravine"], runs, tmp_path / f"lost.{kind}").stat().st_size > 0
    assert (tmp_path / "lost.html").read_text(encoding="utf-8").count("diverged at step 1<") == 4


@pytest.mark.parametrize("name", ["ravine", "rosenbrock"])
def test_scales_are_equal_and_far_starts_stay_in_view(name: str) -> None:
    """A picture has the same scale on both axes, and around a far start it reaches beyond the minimum."""
    far = LANDSCAPES[name].starting_at(1000, 1000)
    for landscape in (LANDSCAPES[name], far):
        runs = race(landscape, ["rmsprop"], steps=3)
        land, _ = _draw(landscape, runs, dpi=50).figure.axes
        (left, right), (low, high) = land.get_xlim(), land.get_ylim()
        assert (right - left) / (high - low) == pytest.approx(1 / land.get_box_aspect())
        (x, y), (u, v) = landscape.start, landscape.minima[0]
        assert left < x < right
        assert low < y < high
    assert left < 2 * u - x
    assert low < 2 * v - y


def test_curves_that_leave_their_axes_are_marked() -> None:
    """A path that leaves the view, and a loss that leaves its axis, end in a triangle."""
    runs = race("ravine", ["sgd", "rmsprop"], steps=40, lr={"sgd": 0.05})
    land, loss = _draw(LANDSCAPES["ravine"], runs, dpi=50).figure.axes
    calm = _draw(LANDSCAPES["ravine"], race("ravine", ["sgd"], steps=40), dpi=50).figure.axes
    for axes, quiet in zip((land, loss), calm, strict=True):
        ends = [line for line in axes.lines if len(line.get_xdata()) == 1 and not line.get_clip_on()]
        assert ends
        assert not [line for line in quiet.lines if len(line.get_xdata()) == 1 and not line.get_clip_on()]


def test_valleys_have_no_beads() -> None:
    """The lowest band of Rosenbrock's valley is in one piece, from the minimum to the other side of the origin."""
    _, _, z = surface(LANDSCAPES["rosenbrock"].seen_at(1.7), 300)
    lowest = z <= z.max() - 14 / 4
    assert lowest.sum() > 300
    rows = lowest.any(axis=0)
    inside = np.flatnonzero(rows)
    assert rows[inside[0] : inside[-1] + 1].all()


def test_other_suffix_is_refused(tmp_path: Path) -> None:
    """The suffix selects the kind of animation; another suffix is refused."""
    with pytest.raises(ValueError, match=r"'race\.mp4': an animation is a \.gif or a \.webp\."):
        animation(LANDSCAPES["ravine"], race("ravine", steps=1), tmp_path / "race.mp4")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that fails half-way leaves what was there, and nothing beside it."""
    path = tmp_path / "race.png"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_left_alone(made: Path) -> None:
    """Drawing does not open a pyplot figure."""
    from matplotlib import pyplot

    assert made.exists()
    assert pyplot.get_fignums() == []
