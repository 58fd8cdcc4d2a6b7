"""Folders of torch.distributed.checkpoint are read without running their metadata; damaged ones give one sentence."""

import pickle
import re

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved import FLAT, MODEL, NAMED, STATE
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about saving in one process

LAYOUTS = {
    "numbers": {"model": MODEL, "optimizer": STATE, "epoch": 3},
    "names": {"app": {"model": MODEL, "optim": NAMED}},
    "flattened": {"model": MODEL, "optim": FLAT},
    "a list": {"model": MODEL, "optimizers": [STATE]},
    "beside what only code makes": {"model": MODEL, "optimizer": STATE, "args": pytest.approx(1)},
}


def save(path, content):
    """Write a folder with dcp.save in one process."""
    dcp.save(content, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "dcp_to_torch_save"])
def test_a_folder_and_the_file_made_of_it_are_read_alike(layout, as_file, tmp_path):
    """The values and the state of every parameter are equal, even where dcp changes keys and their types."""
    if as_file and "code" in layout:
        pytest.skip("torch.load refuses the file")
    path = save(tmp_path / "step_3", LAYOUTS[layout])
    if as_file:
        dcp_to_torch_save(path, tmp_path / "plain.pt")
        path = tmp_path / "plain.pt"
    held = read_checkpoint(path)
    for name, entry in zip(MODEL, STATE["state"].values(), strict=True):
        np.testing.assert_array_equal(held.params[name], MODEL[name].numpy())
        np.testing.assert_array_equal(held.slots[name]["square_avg"], entry["square_avg"].numpy())
    assert (held.step, held.hyper["lr"]) == (2, 0.1)


class Evil:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("this ran",))


def changed(path, change):
    """Return the folder with changed metadata."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    return path


def _grown(metadata):
    entry = next(e for e in metadata.state_dict_metadata.values() if isinstance(e, TensorStorageMetadata))
    entry.size = torch.Size([1 << 40, *entry.size[1:]])


def _elsewhere(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../plain.pt"


def _longer(metadata):
    for info in metadata.storage_data.values():
        info.length = 1 << 40


def _knotted(metadata):
    knot = ("model",)
    for _ in range(60):
        knot = (knot, knot)
    metadata.planner_data = dict.fromkeys(metadata.planner_data, knot)


def _compressed(metadata):
    for info in metadata.storage_data.values():
        object.__setattr__(info, "transform_descriptors", ["zstd"])


CHANGES = {
    "code": (lambda _: Evil(), "print"),
    "code inside": (lambda metadata: setattr(metadata, "storage_meta", Evil()), "print"),
    "another object": (lambda _: {"w": 1}, "cannot be read"),
    "no pieces": (lambda _: Metadata({}), "cannot be read"),
    "a size that is too large": (_grown, "leave a gap|does not match"),
    "a file elsewhere": (_elsewhere, "is missing"),
    "more bytes than there are": (_longer, "cut short"),
    "paths that contain each other": (_knotted, "neither a string nor an integer"),
    "compressed pieces": (_compressed, "transformed by"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_or_executable_metadata_is_refused(name, tmp_path, capsys):
    """The message names torch's command for a plain file, and no code runs."""
    change, sentence = CHANGES[name]
    path = changed(save(tmp_path / "step_3", LAYOUTS["numbers"]), change)
    with pytest.raises(Unreadable, match=rf"{sentence}.*dcp_to_torch_save\(folder, 'plain.pt'\)") as caught:
        prepare(path)
    assert str(caught.value).isprintable()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9])
def test_an_incomplete_copy_of_a_folder_is_refused(keep, tmp_path):
    """Cut metadata or a cut piece gives one sentence."""
    for name in (".metadata", "__0_0.distcp"):
        path = save(tmp_path / name.strip("._"), LAYOUTS["numbers"])
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(Unreadable, match=re.escape(path.name)):
            prepare(path)
