"""Record what follows from other checkpoints here: one more step of bitsandbytes, and torch's states in other files.

Run it after make_torch.py, with torch, bitsandbytes, safetensors and this package:

    python tests/checkpoints/make_more.py

bnb_rmsprop8.next.npz   the parameters after one more step of bitsandbytes' own RMSprop8bit from bnb_rmsprop8.pt: from
                        then on it rounds its states to 8 bits at every step, and whoever goes on in float32 departs.
sb3_rmsproptflike.zip   what stable_baselines3's model.save writes, as far as it matters: "policy.pth" and
                        "policy.optimizer.pth", torch.save's files of the two halves of sb3_rmsproptflike.pt, "data"
                        and the version.
torch_rmsprop_centered.safetensors
                        torch_rmsprop_centered.pt as rmsprop.convert writes it.
"""

import io
import json
import zipfile

import inputs
import numpy as np
import torch


def one_more_step() -> None:
    """bitsandbytes goes on from its own checkpoint, by one step."""
    from bitsandbytes.optim import RMSprop8bit

    whole = torch.load(inputs.HERE / "bnb_rmsprop8.pt", weights_only=True)
    params = {name: torch.nn.Parameter(value.clone()) for name, value in whole["model"].items()}
    stepped = RMSprop8bit(list(params.values()), lr=inputs.LR, alpha=0.99, eps=1e-8)
    stepped.load_state_dict(whole["optimizer"])
    for name, value in inputs.gradients(table=True)[inputs.SAVED_AT].items():
        params[name].grad = torch.from_numpy(value.copy())
    stepped.step()
    made = {f"next/{name}": param.detach().numpy() for name, param in params.items()}
    np.savez_compressed(inputs.HERE / "bnb_rmsprop8.next.npz", **made)


def sb3_archive() -> None:
    """The two halves of sb3_rmsproptflike.pt, as model.save archives them."""
    whole = torch.load(inputs.HERE / "sb3_rmsproptflike.pt", weights_only=True)
    with zipfile.ZipFile(inputs.HERE / "sb3_rmsproptflike.zip", "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": "ActorCriticPolicy"}))
        for name, half in whole.items():
            held = io.BytesIO()
            torch.save(half, held)
            archive.writestr(f"{name}.pth", held.getvalue())
        archive.writestr("_stable_baselines3_version", "2.9.2")


def safetensors_file() -> None:
    """A file of this package's own."""
    from rmsprop.conversion import file

    out = inputs.HERE / "torch_rmsprop_centered.safetensors"
    plan = file.prepare(inputs.HERE / "torch_rmsprop_centered.pt", out=file.writer(out))
    file.write(plan, out, force=True)


if __name__ == "__main__":
    one_more_step()
    sb3_archive()
    safetensors_file()
