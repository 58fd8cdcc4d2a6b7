"""Data sets of the demo: scikit-learn's handwritten digits, or the user's own table.

A file is read strictly. Nothing is dropped, filled in, or guessed. A cell that is not a number is refused with its
position, and every message states what was found and what would work.
"""

import csv
import math
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEST_SHARE = 0.25
MIN_ROWS = 10
MAX_FRACTIONS = 20  # more distinct fractional labels than this are a quantity, not classes

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Names = tuple[str, ...]


class DataError(ValueError):
    """Raised for a file that cannot be trained on, with one or two sentences for the user."""


@dataclass(frozen=True)
class Dataset:
    """Training rows and test rows.

    Shapes: x_train (n, features) for a table, (n, channels, height, width) for images, float32; y_train (n,),
            int64, indices into class_names. x_test and y_test likewise.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: Names
    feature_names: Names
    source: str

    @property
    def is_image(self) -> bool:
        """True if the rows are images, which the convolutional network trains on."""
        return self.x_train.dim() == 4


def load_digits(seed: int) -> Dataset:
    """Return scikit-learn's 1797 handwritten digits of 8x8 gray pixels, which its package includes.

    Units: a pixel ranges from 0 (paper) to 1 (ink).
    """
    bunch: Any = import_module("sklearn.datasets").load_digits()  # sklearn has no type stubs
    x = np.asarray(bunch.images, dtype=np.float64)[:, None] / 16
    y = np.asarray(bunch.target, dtype=np.int64)
    names = tuple(str(name) for name in bunch.target_names)
    return _dataset(x, y, _split(y, names, seed), names, (), "scikit-learn's handwritten digits (8x8 pixels)")


def load_file(path: Path, target: str | None, seed: int) -> Dataset:
    """Read rows and labels from a .csv (also .tsv, .txt) with a header line, or from an .npz.

    Features are standardized with the mean and the standard deviation of the training rows alone: tables column by
    column, images as a whole. `target` names the label column of a .csv, whose other columns are the features, or the
    label array of an .npz ("y" if None), whose array "X" holds the features.

    Shapes: X is (n, features), (n, height, width) or (n, channels, height, width).
    Raises: DataError.
    """
    if not path.exists():
        raise DataError(f"There is no file {path}.")
    if not path.is_file():
        raise DataError(f"{path} is a folder; give a .csv or .npz file.")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        x, y, names = _read_npz(path, target or "y")
        features = tuple(f"x{i}" for i in range(x.shape[1])) if x.ndim == 2 else ()
    elif suffix in (".csv", ".tsv", ".txt"):
        x, y, names, features = _read_csv(path, target)
    else:
        raise DataError(f"{path.name} ends in {suffix or 'nothing'}; give a .csv, .tsv, .txt or .npz file.")
    rows = _split(y, names, seed)
    return _dataset(_standardize(x, rows[0], features), y, rows, names, features, path.name)


def _dataset(
    x: Floats, y: Labels, rows: tuple[Labels, Labels], names: Names, features: Names, source: str
) -> Dataset:
    inputs, labels = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)
    train, test = (torch.from_numpy(i) for i in rows)
    return Dataset(inputs[train], labels[train], inputs[test], labels[test], names, features, source)


def _split(y: Labels, names: Names, seed: int) -> tuple[Labels, Labels]:
    """Return the indices of the training and the test rows, with the same share of every class, for a seed."""
    if len(y) < MIN_ROWS:
        raise DataError(f"There are {len(y)} rows; at least {MIN_ROWS} are needed to train and to test.")
    if len(names) < 2:
        raise DataError(f"All rows have the label {names[0]!r}; at least 2 classes are needed.")
    draw = np.random.default_rng(seed)
    train, test = [], []
    for label, name in enumerate(names):
        rows = draw.permutation(np.flatnonzero(y == label))
        if len(rows) < 2:
            raise DataError(f"Class {name!r} has 1 row; at least 2 are needed, one to train and one to test.")
        held_back = max(1, round(TEST_SHARE * len(rows)))
        test.append(rows[:held_back])
        train.append(rows[held_back:])
    return draw.permutation(np.concatenate(train)), draw.permutation(np.concatenate(test))


def _standardize(x: Floats, train: Labels, features: Names) -> Floats:
    axes = (0,) if x.ndim == 2 else tuple(range(x.ndim))
    with np.errstate(all="ignore"):
        mean: Floats = x[train].mean(axis=axes, keepdims=True)
        spread: Floats = x[train].std(axis=axes, keepdims=True)
        spread[spread == 0] = 1  # a constant column becomes zeros
        scaled: Floats = (x - mean) / spread
        fits = np.isfinite(spread) & (np.abs(scaled).max(axis=axes, keepdims=True) < np.finfo(np.float32).max)
    if not fits.all():
        where = f"column {features[int(np.argmin(fits))]!r}" if x.ndim == 2 else "X"
        raise DataError(f"The numbers in {where} are too large to standardize.")
    return scaled


def _classes(labels: list[str], where: str) -> tuple[Labels, Names]:
    """Return class indices and names for labels that are text or whole numbers ("1", "1.0", and "01" are one class).

    Args:
        where: the labels' place for the message, such as "column 'y'" or "array 'y'".
    """
    numbers = [_number(label) for label in labels]
    known = [number for number in numbers if number is not None]
    if len(known) == len(labels):
        distinct = sorted(set(known))
        fractional = any(number != int(number) for number in distinct)
        if fractional and (len(distinct) > MAX_FRACTIONS or 2 * len(distinct) > len(labels)):
            raise DataError(
                f"The target {where} is continuous: {len(distinct)} distinct fractional numbers in "
                f"{len(labels)} rows. Classification labels are expected: a few classes, as text or whole numbers."
            )
        index = {number: i for i, number in enumerate(distinct)}
        y = [index[number] for number in known]
        names = [repr(number) if fractional else str(int(number)) for number in distinct]
    else:
        names = sorted(set(labels))
        place = {name: i for i, name in enumerate(names)}
        y = [place[label] for label in labels]
    if len(names) > 2 and 2 * len(names) > len(labels):
        raise DataError(
            f"The target {where} has {len(names)} distinct values in {len(labels)} rows, which looks like a "
            "quantity or an identifier. Classification labels are expected: a few classes with several rows each."
        )
    return np.asarray(y, dtype=np.int64), tuple(names)


def _number(cell: str) -> float | None:
    """Return the cell as a number, or None if it is text, as is Python's 1_000."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


# --- .csv --------------------------------------------------------------------------------


def _read_csv(path: Path, target: str | None) -> tuple[Floats, Labels, Names, Names]:
    header, rows = _cells(path)
    label = _target_column(header, target)
    kept = [i for i in range(len(header)) if i != label]
    if not kept:
        raise DataError(f"{path.name} has only the label column {header[label]!r}; a feature is needed too.")
    x, labels = np.empty((len(rows), len(kept))), []
    for r, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{line} of {path.name} has {len(row)} cells; the header names {len(header)} columns.")
        labels.append(row[label].strip())
        value = _number(labels[-1])
        if not labels[-1] or (value is not None and not math.isfinite(value)):
            what = f"{labels[-1]!r} is not a label" if labels[-1] else "the label is empty"
            raise DataError(f"{line} of {path.name}, target column {header[label]!r}: {what}.")
        for c, i in enumerate(kept):
            value = _number(row[i])
            if value is None or not math.isfinite(value):
                raise DataError(_bad_cell(row[i].strip(), value, header[i], line, path))
            x[r, c] = value
    if not rows:
        raise DataError(f"{path.name} has a header and no rows.")
    y, names = _classes(labels, f"column {header[label]!r}")
    return x, y, names, tuple(header[i] for i in kept)


def _cells(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the header, and every row with its position: "Line 7", or "Lines 7 to 9" for quoted line ends."""
    rows: list[tuple[str, list[str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline())
            file.seek(0)
            reader, last = csv.reader(file, delimiter=delimiter, strict=True), 0
            for row in reader:
                first, last = last + 1, reader.line_num
                if len(row) > 1 or "".join(row).strip():  # skips blank lines
                    rows.append((f"Line {first}" if first == last else f"Lines {first} to {last}", row))
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8 text; save it as UTF-8 CSV.") from None
    except csv.Error as error:
        raise DataError(f"{path.name} is not readable as CSV at line {reader.line_num}: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if not rows:
        raise DataError(f"{path.name} is empty; expected a header line and rows.")
    header = [name.strip() for name in rows[0][1]]
    for i, name in enumerate(header):
        if not name:
            raise DataError(
                f"Column {i + 1} of {path.name} has no name in the header; name it, or save without it "
                "(pandas: index=False)."
            )
        if name in header[:i]:
            raise DataError(f"Two columns of {path.name} are named {name!r}; give each its own name.")
    return header, rows[1:]


def _delimiter(header: str) -> str:
    """Detect the delimiter (comma, semicolon, or tab) from the header alone, since cells may contain commas."""
    try:
        return csv.Sniffer().sniff(header, delimiters=",;\t").delimiter
    except csv.Error:
        return ","


def _target_column(header: list[str], target: str | None) -> int:
    more = f" and {len(header) - 30} more" if len(header) > 30 else ""
    columns = f"The columns are: {', '.join(map(repr, header[:30]))}{more}."
    if target is None:
        raise DataError(f"--data needs --target, the name of the label column. {columns}")
    if target in header:
        return header.index(target)
    folded = {name.casefold(): name for name in header}
    close = get_close_matches(target.casefold(), list(folded), n=1)
    hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
    if all(_number(name) is not None for name in header):
        hint = " The first line must name the columns, but it contains only numbers."
    raise DataError(f"There is no column {target!r}.{hint} {columns}")


def _bad_cell(cell: str, value: float | None, column: str, line: str, path: Path) -> str:
    place = f"{line} of {path.name}, feature column {column!r}:"
    if not cell:
        return f"{place} the cell is empty; fill it in or remove the row."
    if value is not None:
        return f"{place} {cell!r} is not a finite number; replace it or remove the row."
    if _number(cell.replace(",", ".", 1)) is not None:
        return f"{place} {cell!r} has a decimal comma; write a decimal point."
    return f"{place} {cell!r} is text; features must be numbers, so encode or remove the column."


# --- .npz --------------------------------------------------------------------------------


def _read_npz(path: Path, target: str) -> tuple[Floats, Labels, Names]:
    raw, labels = _arrays(path, ("X", target))
    if raw.dtype.kind not in "biuf":
        raise DataError(f"X in {path.name} holds {raw.dtype}; features must be real numbers.")
    if raw.ndim not in (2, 3, 4) or 0 in raw.shape:
        raise DataError(
            f"X in {path.name} has the shape {raw.shape}; expected (n, features), (n, height, width) or "
            "(n, channels, height, width), none of them 0."
        )
    if raw.ndim == 4 and raw.shape[3] in (1, 3, 4) and raw.shape[1] not in (1, 3, 4):
        raise DataError(
            f"X in {path.name} has the shape {raw.shape}, with the channels last; expected (n, channels, "
            "height, width): save np.moveaxis(X, -1, 1)."
        )
    if labels.shape not in ((len(raw),), (len(raw), 1)):
        hint = " For one-hot labels save y.argmax(axis=1)." if labels.ndim == 2 else ""
        raise DataError(
            f"{target} in {path.name} has the shape {labels.shape}, but X has {len(raw)} rows; expected "
            f"({len(raw)},).{hint}"
        )
    x = raw.astype(np.float64)
    _refuse_gap(x, "X", path)
    y, names = _npz_labels(labels.reshape(-1), target, path)
    return (x[:, None] if x.ndim == 3 else x), y, names


def _arrays(path: Path, names: tuple[str, str]) -> list[NDArray[Any]]:
    with path.open("rb") as file:  # NumPy leaves a damaged file open if it opens the file itself
        try:
            opened = np.load(file, allow_pickle=False)  # unpickling can run any code
        except Exception:  # NumPy and zipfile raise several types for a damaged file
            raise DataError(f"{path.name} is not a readable .npz file; write one with np.savez.") from None
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"{path.name} holds a single array; save it with np.savez(file, X=..., y=...).")
        return [_array(opened, name, path) for name in names]


def _array(opened: np.lib.npyio.NpzFile, name: str, path: Path) -> NDArray[Any]:
    if name not in opened.files:
        raise DataError(f"{path.name} has no array {name!r}; it has: {', '.join(map(repr, opened.files))}.")
    try:
        found: NDArray[Any] = opened[name]
    except Exception as error:
        if "allow_pickle" not in str(error):
            raise DataError(f"{name} in {path.name} is damaged: {error}.") from None
        raise DataError(
            f"{name} in {path.name} is a pickled object array, which can run code when it is read; save it as "
            "numbers, or labels as text, instead."
        ) from None
    return found


def _refuse_gap(x: Floats, name: str, path: Path) -> None:
    gaps = np.argwhere(~np.isfinite(x))
    if len(gaps):
        place = tuple(int(i) for i in gaps[0])
        row, column = place[0], ", ".join(map(str, place[1:]))
        where = f"row {row}, column {column}" if column else f"row {row}"
        raise DataError(
            f"{name} in {path.name} is {x[place]} at {where} (counted from 0); replace it or remove the row."
        )


def _npz_labels(labels: NDArray[Any], target: str, path: Path) -> tuple[Labels, Names]:
    where = f"array {target!r}"
    if labels.dtype.kind in "iuf":
        _refuse_gap(labels.astype(np.float64), target, path)
        return _classes([repr(label) for label in labels.tolist()], where)
    if labels.dtype.kind in "bU":
        words = [str(label).strip() for label in labels.tolist()]
        if "" in words:
            raise DataError(f"{target} in {path.name} is empty at row {words.index('')} (counted from 0).")
        return _classes(words, where)
    raise DataError(f"{target} in {path.name} holds {labels.dtype}; labels must be text or whole numbers.")
