"""Estimates from checkpoint files: the same bytes as the model's, from headers alone."""

import json

import pytest
import safetensors.torch
import torch
from allocated import peak
from cases import mostly_long
from paths import CHECKPOINTS
from torch import nn

from rmsprop import RMSprop, checkpoint, estimate


def network():
    return nn.Sequential(
        nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 300, dtype=torch.float16)
    ).bfloat16()


def stepped(model):
    optimizer = RMSprop(model.named_parameters(), momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def to_safetensors(folder, model):
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def to_torch(folder, model):
    torch.save({"model": model.state_dict(), "optimizer": stepped(model).state_dict()}, folder / "run.pt")
    return folder / "run.pt"


def to_legacy(folder, model):
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def to_checkpoint(folder, model):
    return checkpoint.save(folder / "run.safetensors", model=model, optimizer=stepped(model), rng=True, step=3)


def to_shards(folder, model):
    names = list(model.state_dict())
    files = {name: f"model-0000{1 + (i > 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: x for name, x in model.state_dict().items() if files[name] == file}
        safetensors.torch.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def to_dcp(folder, model):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict(), "step": 4}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


WRITTEN = (to_safetensors, to_torch, to_legacy, to_checkpoint, to_shards, to_dcp)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("write", mostly_long(WRITTEN, lambda i, _: i < 2), ids=lambda f: f.__name__)
def test_a_file_gives_the_models_bytes_without_its_numbers(write, tmp_path) -> None:
    """Parameters and buffers of their dtypes; torch's allocator gives no tensor of the file's size."""
    model = network()
    path = write(tmp_path, model)
    found = []
    own = peak(lambda: found.append(estimate(path, momentum=0.9, dtype="float32")))
    expected = estimate(network(), momentum=0.9, dtype="float32")
    assert found[0].total == expected.total
    assert found[0].elements == expected.elements
    assert estimate(str(path)).total == estimate(network()).total
    assert own < 240_000, "the miniature of a step has 1,000 elements, and each weight 120,000 x 2 bytes"


def test_a_file_larger_than_memory_is_read_by_its_header(tmp_path) -> None:
    """400 GB, of which the disk holds the header alone."""
    path, side = tmp_path / "huge.safetensors", 100_000
    tensors = {
        f"{i}": {"dtype": "F32", "shape": [side, side], "data_offsets": [4 * side**2 * i, 4 * side**2 * (i + 1)]}
        for i in range(10)
    }
    head = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + 40 * side**2)
    found = estimate(path, memory="640GB", device="cuda", fused=True)
    assert found.total.weights == 40 * side**2
    assert found.fits() is False
    verdicts = {other["name"]: other["fits"] for other in found.to_dict()["alternatives"]}
    assert verdicts["in backward"] is False
    assert verdicts["float8 state, in backward"] is True


def test_tied_weights_count_once_and_frozen_ones_have_no_state(tmp_path) -> None:
    """By the file's storages, and by the names in the file's optimizer."""
    model = nn.ModuleDict({"a": nn.Embedding(20, 6), "b": nn.Linear(6, 20, bias=False), "c": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    for path, save in ((tmp_path / "m.pt", torch.save), (tmp_path / "m.safetensors", None)):
        if save is not None:
            save(model.state_dict(), path)
        else:
            checkpoint.save(path, model=model)
        assert estimate(path).total == estimate(model).total
    whole = torch.ones(6, 4)
    torch.save({"a": whole[:3], "b": whole[3:]}, tmp_path / "halves.pt")  # of one shape and storage, and not tied
    assert estimate(tmp_path / "halves.pt").elements == 24
    optimizer = RMSprop(model["c"].named_parameters(prefix="c"))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "frozen.pt")
    found = estimate(tmp_path / "frozen.pt")
    assert found.elements == 42
    assert found.total.weights + found.total.buffers == 4 * (42 + 120)


def test_one_of_several_models_is_chosen_by_its_path(tmp_path) -> None:
    """Without a choice, the sentence names them."""
    torch.save({"actor": nn.Linear(5, 5).state_dict(), "critic": nn.Linear(9, 9).state_dict()}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two\.pt holds 2 models"):
        estimate(tmp_path / "two.pt")
    assert estimate(tmp_path / "two.pt", parameters="critic").elements == 90
    with pytest.raises(ValueError, match=r"'actress' is not in two\.pt"):
        estimate(tmp_path / "two.pt", parameters="actress")


@pytest.mark.parametrize("name", ["keras3-momentum.keras", "torch_rmsprop_named.pt"])
def test_other_formats_are_read_as_convert_reads_them(name) -> None:
    """The weights in the recorded file."""
    found = estimate(CHECKPOINTS / name)
    assert found.total.weights == 4 * found.elements > 0


def test_a_file_without_a_model_is_one_sentence(tmp_path) -> None:
    """An optimizer's state alone, integers, a damaged header, a shard that is missing, or a hostile dtype."""
    torch.save(stepped(network()).state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt holds an optimizer's state and no model"):
        estimate(tmp_path / "state.pt")
    safetensors.torch.save_file({"x": torch.ones(2, dtype=torch.int8)}, tmp_path / "int.safetensors")
    with pytest.raises(ValueError, match="no model's state dict"):
        estimate(tmp_path / "int.safetensors")
    whole = to_safetensors(tmp_path, network())
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a valid safetensors file"):
        estimate(tmp_path / "cut.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    to_shards(shards, network())
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be found, such as 'model-00002"):
        estimate(shards)
    ours = to_checkpoint(tmp_path, network())
    ours.write_bytes(ours.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"run\.safetensors .* is not a complete checkpoint"):
        estimate(ours)
    with pytest.raises(ValueError, match=r"='net' selects a model in a torch\.save file.*leave it out"):
        estimate(CHECKPOINTS / "keras3-momentum.keras", parameters="net")
    head = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0\0")
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        estimate(tmp_path / "odd.safetensors")
