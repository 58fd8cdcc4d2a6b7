"""`rmsprop.demo.data`: digits without a download, and tables read strictly or refused in one sentence."""

import numpy as np
import pytest
import torch

from rmsprop.demo.data import DataError, load_digits, load_file


def table(tmp_path, text, name="table.csv", encoding="utf-8"):
    """Write a file with this text."""
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def rows(count=12, labels=("cat", "dog"), delimiter=",", header=("a", "b", "kind")):
    """Return the lines of a clean table: two features and a label, 12 rows by default."""
    lines = [delimiter.join(header)]
    lines += [delimiter.join((str(i), str(i * i / 4), labels[i % len(labels)])) for i in range(count)]
    return lines


def arrays(tmp_path, name="data.npz", **found):
    """Write an .npz with these arrays."""
    path = tmp_path / name
    np.savez(path, **found)
    return path


def refusal(path, target="kind"):
    """Return the message with which the file is refused."""
    with pytest.raises(DataError) as caught:
        load_file(path, target, seed=0)
    return str(caught.value)


X = np.arange(40.0).reshape(20, 2)
Y = np.arange(20) % 2


def test_digits():
    """The digits are 1797 images of one channel and 8x8 pixels from 0 to 1, in ten classes, a quarter held back."""
    digits = load_digits(seed=0)
    assert digits.is_image
    assert digits.x_train.shape[1:] == (1, 8, 8)
    assert len(digits.y_train) + len(digits.y_test) == 1797
    assert len(digits.y_test) == 450
    assert digits.class_names == tuple("0123456789")
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert digits.x_train.dtype == torch.float32
    assert digits.y_train.dtype == torch.int64


def test_split_is_stratified_and_seeded():
    """Every class gives the same share of its rows to the test, and the seed alone decides which."""
    first, same, other = load_digits(1), load_digits(1), load_digits(2)
    assert torch.equal(first.x_test, same.x_test)
    assert not torch.equal(first.x_test, other.x_test)
    for digit in range(10):
        tested, trained = (int((y == digit).sum()) for y in (first.y_test, first.y_train))
        assert tested == round(0.25 * (tested + trained))


def test_split_keeps_rows_with_their_labels(tmp_path):
    """No row is lost, doubled, or parted from its label."""
    path = arrays(tmp_path, X=np.stack([np.arange(40.0), np.arange(40) % 4], axis=1), y=np.arange(40) % 4)
    data = load_file(path, None, seed=3)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert len(x[:, 0].unique()) == 40
    for label in range(4):
        assert len(x[y == label, 1].unique()) == 1


def test_csv(tmp_path):
    """A .csv gives its columns by name, and text labels become classes in alphabetical order."""
    data = load_file(table(tmp_path, "\n".join(rows())), "kind", seed=0)
    assert not data.is_image
    assert data.feature_names == ("a", "b")
    assert data.class_names == ("cat", "dog")
    assert data.source == "table.csv"
    assert data.x_train.shape == (8, 2)
    assert data.x_test.shape == (4, 2)


def test_target_may_be_any_column(tmp_path):
    """The label column need not be the last one."""
    lines = [",".join(reversed(line.split(","))) for line in rows()]
    data = load_file(table(tmp_path, "\n".join(lines)), "kind", seed=0)
    assert data.feature_names == ("b", "a")
    assert data.class_names == ("cat", "dog")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters(tmp_path, delimiter):
    """Comma, semicolon, and tab are detected from the header line."""
    text = "\n".join(rows(delimiter=delimiter))
    assert load_file(table(tmp_path, text, "table.tsv"), "kind", seed=0).feature_names == ("a", "b")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    """A file that a spreadsheet wrote on Windows reads like any other."""
    path = table(tmp_path, "\r\n".join(rows()) + "\r\n", encoding="utf-8-sig")
    assert load_file(path, "kind", seed=0).feature_names == ("a", "b")


def test_blank_lines_are_not_rows(tmp_path):
    """Blank lines are skipped, and still counted as lines in the file."""
    lines = rows()
    lines.insert(3, "")
    assert len(load_file(table(tmp_path, "\n".join(lines) + "\n\n"), "kind", seed=0).y_train) == 8
    lines[5] = "x,1,cat"
    assert refusal(table(tmp_path, "\n".join(lines))).startswith("Line 6 of table.csv, feature column 'a': 'x'")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("red", "'red' is text; features must be numbers"),
        ("NA", "'NA' is text"),
        ("1_000", "'1_000' is text"),
        ("1,5", "'1,5' has a decimal comma; write a decimal point"),
        ("", "the cell is empty"),
        (" ", "the cell is empty"),
        ("nan", "'nan' is not a finite number"),
        ("-inf", "'-inf' is not a finite number"),
        ("1e999", "'1e999' is not a finite number"),
    ],
)
def test_bad_feature_cells(tmp_path, cell, words):
    """A cell that is not a finite number is refused with its line in the file and its column."""
    lines = rows(delimiter=";")
    lines[4] = f"1;{cell};cat"
    assert refusal(table(tmp_path, "\n".join(lines))).startswith(f"Line 5 of table.csv, feature column 'b': {words}")


def test_lines_are_counted_through_quoted_line_ends(tmp_path):
    """A quoted cell with line ends moves the numbers of the lines after it, and a row names all its own lines."""
    lines = rows()
    lines[2] = '1,2,"a\ndog\nindeed"'
    lines[4] = "1,red,cat"
    assert refusal(table(tmp_path, "\n".join(lines))).startswith("Line 7 of table.csv, feature column 'b'")
    lines[2] = '1,red,"a\ndog\nindeed"'
    assert refusal(table(tmp_path, "\n".join(lines))).startswith("Lines 3 to 5 of table.csv, feature column 'b'")


@pytest.mark.parametrize(("cell", "words"), [("", "the label is empty"), ("nan", "'nan' is not a label")])
def test_bad_labels(tmp_path, cell, words):
    """An empty or NaN label is refused with its line."""
    lines = rows()
    lines[3] = f"1,2,{cell}"
    assert refusal(table(tmp_path, "\n".join(lines))) == f"Line 4 of table.csv, target column 'kind': {words}."


def test_missing_file(tmp_path):
    """A missing file is named."""
    assert refusal(tmp_path / "nowhere.csv") == f"There is no file {tmp_path / 'nowhere.csv'}."


def test_folder(tmp_path):
    """A folder is not a file."""
    assert refusal(tmp_path) == f"{tmp_path} is a folder; give a .csv or .npz file."


def test_unknown_suffix(tmp_path):
    """Other kinds of file are refused by their ending."""
    assert refusal(table(tmp_path, "a,b", "table.xlsx")) == (
        "table.xlsx ends in .xlsx; give a .csv, .tsv, .txt or .npz file."
    )


def test_missing_column(tmp_path):
    """A missing column is refused with the existing columns and the closest of them."""
    path = table(tmp_path, "\n".join(rows()))
    columns = "The columns are: 'a', 'b', 'kind'."
    assert refusal(path, "Kinds") == f"There is no column 'Kinds'. Did you mean 'kind'? {columns}"
    assert refusal(path, "zzzzzz") == f"There is no column 'zzzzzz'. {columns}"
    assert refusal(path, None) == f"--data needs --target, the name of the label column. {columns}"


def test_missing_header(tmp_path):
    """A first line of numbers is recognized as data."""
    assert "The first line must name the columns, but it contains only numbers." in refusal(
        table(tmp_path, "1,2,0\n3,4,1\n")
    )


def test_many_columns_are_not_all_listed(tmp_path):
    """A wide table lists its first 30 columns."""
    header = ",".join(f"c{i}" for i in range(100))
    assert refusal(table(tmp_path, header)).endswith("'c28', 'c29' and 70 more.")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "table.csv is empty; expected a header line and rows."),
        ("a,kind\n", "table.csv has a header and no rows."),
        ("kind\ncat\n", "table.csv has only the label column 'kind'; a feature is needed too."),
        ("a,a,kind\n1,2,x\n", "Two columns of table.csv are named 'a'; give each its own name."),
        (
            ",a,kind\n",
            "Column 1 of table.csv has no name in the header; name it, or save without it (pandas: index=False).",
        ),
        ("a,kind\n1,x\n1\n", "Line 3 of table.csv has 1 cells; the header names 2 columns."),
        ("a,kind\n1,x,2\n", "Line 2 of table.csv has 3 cells; the header names 2 columns."),
        ('a,kind\n1,"x\n', "table.csv is not readable as CSV at line 2: unexpected end of data."),
        ("a,kind\n1,x\n2,y\n", "There are 2 rows; at least 10 are needed to train and to test."),
        ("\n".join(rows(labels=("cat",))), "All rows have the label 'cat'; at least 2 classes are needed."),
        (
            "\n".join([*rows(), "1,2,emu"]),
            "Class 'emu' has 1 row; at least 2 are needed, one to train and one to test.",
        ),
    ],
)
def test_unusable_tables(tmp_path, text, sentence):
    """A table that cannot be trained on is refused with the reason."""
    assert refusal(table(tmp_path, text)) == sentence


def test_wrong_encoding(tmp_path):
    """Text that is not UTF-8 is refused as such."""
    path = table(tmp_path, "\n".join(rows(labels=("Käfer", "Hund"))), encoding="latin-1")
    assert refusal(path) == "table.csv is not UTF-8 text; save it as UTF-8 CSV."


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("2", "10"), ("2", "10")),
        (("1.0", "0.0"), ("0", "1")),
        (("1", "1.0", "0"), ("0", "1")),
        (("-1", "1"), ("-1", "1")),
        (("0.5", "1.5"), ("0.5", "1.5")),
        (("1", "x"), ("1", "x")),
        (("True", "False"), ("False", "True")),
    ],
)
def test_kinds_of_labels(tmp_path, labels, names):
    """Whole numbers are classes in order of size, however they are written; anything else is text."""
    data = load_file(table(tmp_path, "\n".join(rows(labels=labels))), "kind", seed=0)
    assert data.class_names == names


def test_continuous_target(tmp_path):
    """A target of many distinct fractions is refused with what is expected."""
    labels = [f"{i / 7:.3f}" for i in range(30)]
    assert refusal(table(tmp_path, "\n".join(rows(30, labels)))) == (
        "The target column 'kind' is continuous: 30 distinct fractional numbers in 30 rows. "
        "Classification labels are expected: a few classes, as text or whole numbers."
    )


def test_identifier_as_target(tmp_path):
    """A target that differs in almost every row is not a set of classes."""
    assert "which looks like a quantity or an identifier" in refusal(
        table(tmp_path, "\n".join(rows(30, [f"id{i}" for i in range(30)])))
    )


def test_standardized_by_the_training_rows(tmp_path):
    """Each column has mean 0 and standard deviation 1 over the training rows alone; constants become 0."""
    x = np.random.default_rng(0).lognormal(size=(40, 3)) * [1, 1e6, 0] + [0, 5, 7]
    data = load_file(arrays(tmp_path, X=x, y=np.arange(40) % 2), None, seed=0)
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.x_train.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert data.x_test[:, :2].mean(0).abs().min() > 1e-3
    assert (data.x_test[:, 2] == 0).all()


def test_too_large_numbers(tmp_path):
    """Finite numbers whose spread is not finite are refused by column."""
    lines = rows()
    lines[1:4] = ["1e308,1,cat", "-1e308,1,dog", "1e308,1,cat"]
    assert refusal(table(tmp_path, "\n".join(lines))) == "The numbers in column 'a' are too large to standardize."


@pytest.mark.parametrize(
    ("shape", "expected", "image"),
    [((20, 3), (3,), False), ((20, 5, 6), (1, 5, 6), True), ((20, 3, 5, 6), (3, 5, 6), True)],
)
def test_npz_shapes(tmp_path, shape, expected, image):
    """An .npz holds a table (n, features) or images (n, height, width) or (n, channels, height, width)."""
    x = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    data = load_file(arrays(tmp_path, X=x, y=Y), None, seed=0)
    assert data.x_train.shape[1:] == expected
    assert data.is_image == image
    assert data.x_train.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array(["b", "a"] * 10), ("a", "b")),
        (np.array([3.0, 1.0] * 10), ("1", "3")),
        (np.array([True, False] * 10), ("False", "True")),
        (np.array([[5], [4]] * 10, dtype=np.uint8), ("4", "5")),
    ],
)
def test_npz_labels(tmp_path, labels, names):
    """The label array may hold text, whole numbers or truth values, under the name that --target gives."""
    assert load_file(arrays(tmp_path, X=X, label=labels), "label", seed=0).class_names == names


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"x": X, "y": Y}, "data.npz has no array 'X'; it has: 'x', 'y'."),
        ({"X": X, "labels": Y}, "data.npz has no array 'y'; it has: 'X', 'labels'."),
        ({"X": X[:, 0], "y": Y}, "X in data.npz has the shape (20,); expected (n, features)"),
        ({"X": X.reshape(20, 2, 1, 1, 1), "y": Y}, "X in data.npz has the shape (20, 2, 1, 1, 1); expected"),
        ({"X": X[:, :0], "y": Y}, "X in data.npz has the shape (20, 0); expected"),
        ({"X": np.zeros((20, 8, 8, 3)), "y": Y}, "X in data.npz has the shape (20, 8, 8, 3), with the channels last"),
        ({"X": X, "y": Y[:7]}, "y in data.npz has the shape (7,), but X has 20 rows; expected (20,)."),
        (
            {"X": X, "y": np.eye(2)[Y]},
            "y in data.npz has the shape (20, 2), but X has 20 rows; expected (20,). For one-hot",
        ),
        ({"X": X + 1j, "y": Y}, "X in data.npz holds complex128; features must be real numbers."),
        ({"X": X.astype(str), "y": Y}, "X in data.npz holds <U32; features must be real numbers."),
        ({"X": X, "y": Y + 0j}, "y in data.npz holds complex128; labels must be text or whole numbers."),
        ({"X": X, "y": np.array(["a", ""] * 10)}, "y in data.npz is empty at row 1 (counted from 0)."),
        ({"X": X, "y": np.linspace(0, 1, 20)}, "The target array 'y' is continuous: 20 distinct fractional numbers"),
        ({"X": X, "y": np.zeros(20)}, "All rows have the label '0'; at least 2 classes are needed."),
        ({"X": X[:4], "y": Y[:4]}, "There are 4 rows; at least 10 are needed"),
    ],
)
def test_unusable_arrays(tmp_path, found, sentence):
    """An .npz that cannot be trained on is refused with what was found and what would work."""
    assert refusal(arrays(tmp_path, **found), None if "label" not in found else "label").startswith(sentence)


def test_npz_gaps(tmp_path):
    """NaN and infinity in arrays are refused by row and column."""
    x, pictures, y = X.copy(), np.zeros((20, 4, 4)), Y.astype(float)
    x[3, 1], pictures[7, 2, 1], y[5] = np.nan, -np.inf, np.nan
    assert refusal(arrays(tmp_path, X=x, y=Y), None).startswith(
        "X in data.npz is nan at row 3, column 1 (counted from 0)"
    )
    assert refusal(arrays(tmp_path, X=pictures, y=Y), None).startswith(
        "X in data.npz is -inf at row 7, column 2, 1 (counted from 0)"
    )
    assert refusal(arrays(tmp_path, X=X, y=y), None).startswith("y in data.npz is nan at row 5 (counted from 0)")


class Trap:
    """Unpickling this would raise in the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle from the file was run",))


@pytest.mark.parametrize("name", ["X", "y"])
def test_pickles_are_refused(tmp_path, name):
    """A pickled object array is refused and not run."""
    found = {"X": X, "y": Y, name: np.array([Trap()] * 20, dtype=object)}
    assert refusal(arrays(tmp_path, **found), None).startswith(
        f"{name} in data.npz is a pickled object array, which can run code when it is read"
    )


def test_files_that_are_not_npz(tmp_path):
    """A damaged .npz, and a lone array under that name, are refused."""
    assert refusal(table(tmp_path, "hello", "bad.npz"), None) == (
        "bad.npz is not a readable .npz file; write one with np.savez."
    )
    whole = arrays(tmp_path, X=X, y=Y).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.npz", None).startswith("cut.npz is not a readable .npz file")
    (tmp_path / "flipped.npz").write_bytes(whole.replace(X.tobytes()[64:96], b"?" * 32))
    assert refusal(tmp_path / "flipped.npz", None).startswith("X in flipped.npz is damaged")
    with (tmp_path / "lone.npz").open("wb") as file:
        np.save(file, X)
    assert refusal(tmp_path / "lone.npz", None).startswith("lone.npz holds a single array")


@pytest.mark.parametrize("header", ["<script>alert(1)</script>", "[bold]x[/bold]", "Größe (m²)", "a\nb"])
def test_any_name_is_accepted(tmp_path, header):
    """Column and class names may hold anything, and come through unchanged."""
    lines = rows(labels=("<b>x</b>", "ok"))
    lines[0] = f'"{header}",b,kind'
    data = load_file(table(tmp_path, "\n".join(lines)), "kind", seed=0)
    assert data.feature_names == (header, "b")
    assert data.class_names == ("<b>x</b>", "ok")
