"""The command `rmsprop estimate`."""

import inspect
import json
import re

import pytest
import torch
from commands import invoke
from torch import nn

from rmsprop import estimate


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.pt"
    torch.save(nn.Linear(30, 20).state_dict(), path)
    return path


def test_the_text_is_the_functions(path) -> None:
    """With settings, a dtype, a device and the memory."""
    words = ("momentum=0.9", "--dtype", "bfloat16", "--device", "cuda", "--memory", "2kB")
    code, text = invoke("estimate", str(path), *words)
    assert code == 0, text
    assert text == f"{estimate(path, momentum=0.9, dtype='bfloat16', device='cuda', memory='2kB')}\n"
    assert "short" in text


def test_json_is_the_record(path) -> None:
    """One object on stdout."""
    code, text = invoke("estimate", str(path), "--json")
    assert code == 0, text
    assert json.loads(text) == json.loads(json.dumps(estimate(path).to_dict()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("momentum",), "'momentum' is not a setting"),
        (("mometum=0.9",), "did you mean 'momentum'"),
        (("memory=3GB",), "memory is an option of this command: write --memory 3GB"),
        (("model=x",), "model=x: give the checkpoint as the first argument."),
        (("--memory", "much"), "memory takes bytes"),
        (("--device", "moon"), "device takes the name of one"),
        (("backend=cpu", "--device", "cuda"), "it computes on the CPU"),
        (("--parameters", "net"), "net"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(path, words, says) -> None:
    """Exit code 2 and no traceback."""
    code, text = invoke("estimate", str(path), *words)
    assert code == 2
    assert "".join(says.split()) in "".join(text.replace("│", "").split())
    assert "Traceback" not in text


@pytest.mark.parametrize("name", sorted(set(inspect.signature(estimate).parameters) - {"model", "settings"}))
def test_an_option_that_is_advised_exists(path, name) -> None:
    """Each argument of the function that is not the model is an option of the command, as its message says."""
    code, text = invoke("estimate", str(path), f"{name}=x")
    [advised] = re.findall(r"write\s+(--\w+)\s+x", re.sub(r"[│\s]+", " ", text))
    assert code == 2
    assert advised == f"--{name}"
    assert f" {advised} " in re.sub(r"[│\s]+", " ", invoke("estimate", "--help")[1])


def test_a_missing_file_is_one_sentence() -> None:
    """Exit code 2."""
    code, text = invoke("estimate", "nowhere.pt")
    assert code == 2
    assert "there is no file 'nowhere.pt'" in text
