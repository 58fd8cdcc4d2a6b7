"""Files from before torch 1.6 and files saved on a GPU are read on a CPU; damaged ones give one sentence."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from paths import CHECKPOINTS as HERE
from saved import MODEL, STATE, resaved

from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, recognize

CONTENT = {
    "model": {**MODEL, "half": torch.ones(3).half(), "count": torch.tensor(3), "empty": torch.empty(0)},
    "tied": MODEL["0.weight"],
    "optimizer": STATE,
}


def legacy(content=CONTENT, protocol=2, moved=False):
    """Return the bytes of a file in the old format. Args: moved: as if its tensors were on the second GPU."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return on_gpu(file.getvalue()) if moved else file.getvalue()


def on_gpu(data):
    """Return the same file with GPU storages, as a pickle of protocol 2 contains them."""
    cpu, gpu = (struct.pack("<BI", ord("X"), len(name)) + name for name in (b"cpu", b"cuda:1"))
    assert cpu in data
    return data.replace(cpu, gpu).replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("moved", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["old.pt", "old.pth.tar", "old", "old.pkl"])
def test_an_old_file_is_read_under_any_name(name, moved, protocol, tmp_path):
    """Values and state equal the saved ones, including views of one storage."""
    if moved and protocol == 4:
        pytest.skip("the replaced bytes are those of an earlier protocol")
    path = tmp_path / name
    path.write_bytes(legacy(moved=moved, protocol=protocol))
    held = read_checkpoint(path)
    for key, value in MODEL.items():
        np.testing.assert_array_equal(held.params[key], value.numpy(), err_msg=key)
        assert key in held.slots
    for slots, entry in zip(held.slots.values(), STATE["state"].values(), strict=True):
        np.testing.assert_array_equal(slots["square_avg"], entry["square_avg"].numpy())
    assert held.params["half"].dtype == np.float16


def test_an_archive_saved_on_a_gpu_is_read(tmp_path):
    """Reading neither needs nor queries a GPU."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(CONTENT, path)
    resaved(path, out, lambda name, data: on_gpu(data) if name.endswith("data.pkl") else data)
    with pytest.raises(Exception, match=r"CUDA|cuda"):
        torch.load(out, weights_only=True)
    held = read_checkpoint(out)
    np.testing.assert_array_equal(held.params["0.weight"], MODEL["0.weight"].numpy())


def test_views_share_their_storage(tmp_path):
    """A slice and a transpose of one storage have their own values."""
    whole = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "old.pt"
    path.write_bytes(legacy({"a": whole, "b": whole[1:], "c": whole.t(), "d": whole[:, 1]}))
    held = read_checkpoint(path)
    for key, value in {"a": whole, "b": whole[1:], "c": whole.t(), "d": whole[:, 1]}.items():
        np.testing.assert_array_equal(held.params[key], value.numpy())


@pytest.mark.parametrize("at", [0.05, 0.3, 0.6, 0.9, -1])
def test_a_cut_old_file_is_one_sentence(at, tmp_path):
    """The message is the same wherever the file is cut."""
    path, data = tmp_path / "old.pt", legacy()
    path.write_bytes(data[: int(at * len(data)) if at > 0 else at])
    with pytest.raises(Unreadable, match=r"from before torch 1\.6, damaged or cut short"):
        prepare(path)


def test_an_old_file_that_declares_more_than_it_has_allocates_nothing(tmp_path):
    """torch would allocate the declared size before reading; this reader checks it against the file first."""
    path, data = tmp_path / "old.pt", legacy({"w": torch.zeros(77)})
    path.write_bytes(data.replace(struct.pack("<BB", ord("K"), 77), struct.pack("<BI", ord("J"), 0x7FFFFFFF)))
    with pytest.raises(Unreadable, match="is incomplete"):
        read_checkpoint(path)


class Evil:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("this ran",))


def test_an_old_file_runs_no_code(tmp_path, capsys):
    """Other objects in the file are skipped; a file that is itself such an object is refused."""
    path = tmp_path / "old.pt"
    path.write_bytes(legacy({**CONTENT, "args": Evil()}))
    assert len(read_checkpoint(path).slots) == 4
    path.write_bytes(legacy(Evil()))
    assert recognize(path).name == "torch"
    with pytest.raises(Unreadable, match="would run code"):
        prepare(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(Evil()) * 9)
    with pytest.raises(Unreadable):
        prepare(path)
    assert capsys.readouterr().out == ""


def test_a_recorded_checkpoint_reads_the_same_in_the_old_format(tmp_path):
    """The checkpoint of a real run is rewritten in the old format."""
    path = tmp_path / "old.pt"
    path.write_bytes(legacy(torch.load(HERE / "torch_rmsprop_named.pt", weights_only=True)))
    new, old = read_checkpoint(HERE / "torch_rmsprop_named.pt"), read_checkpoint(path)
    assert (new.step, new.hyper, list(new.slots)) == (old.step, old.hyper, list(old.slots))
    for name, slots in new.slots.items():
        np.testing.assert_array_equal(slots["square_avg"], old.slots[name]["square_avg"])
