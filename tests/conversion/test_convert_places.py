"""Optimizers and models are found by their structure, under any key of a trainer's file."""

import argparse
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from cases import mostly_long
from commands import invoke
from saved import COPY, FLAT, MODEL, MODEL2, NAMED, STATE, STATE2, TEXTS, net, trained

from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write
from rmsprop.inspection.checkpoint import inspect

# What a trainer saves -> with one optimizer and a model that is its.
LAYOUTS = {
    "optimizer_state": {"model_state": MODEL, "optimizer_state": STATE, "epoch": 3},
    "optim_dict": {"model_dict": MODEL, "optim_dict": STATE},
    "optimizer_dict": {"state_dict": MODEL, "optimizer_dict": STATE},
    "q_optimizer": {"q_network": MODEL, "q_optimizer": STATE, "step": 7},
    "DQN tutorial": {"policy_net": MODEL, "target_net": COPY, "optimizer": STATE},
    "keys of one's own": {"weights": MODEL, "solver": STATE},
    "imagenet example": {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": MODEL,
        "best_acc1": torch.tensor(71.5),
        "optimizer": STATE,
    },
    "timm": {"state_dict": MODEL, "state_dict_ema": COPY, "optimizer": STATE, "version": 2},
    "timm with an EMA first": {"model_ema": COPY, "model": MODEL, "optimizer": STATE},
    "Lightning": {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": MODEL,
        "optimizer_states": [STATE],
        "lr_schedulers": [{"last_epoch": 1, "_last_lr": [0.1]}],
        "callbacks": {"EMA": {"shadow": COPY}},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "Ignite": {"trainer": {"epoch_length": 4}, "model": MODEL, "optimizer": STATE},
    "detectron2": {"model": MODEL, "optimizer": STATE, "scheduler": {"last_epoch": 2}, "iteration": 9},
    "MMEngine": {"meta": {"epoch": 1}, "state_dict": MODEL, "optimizer": STATE, "ema_state_dict": COPY},
    "fairseq": {"model": MODEL, "last_optimizer_state": STATE, "optimizer_history": [{"num_updates": 2}]},
    "Catalyst": {"model_state_dict": MODEL, "criterion_state_dict": {}, "optimizer_state_dict": STATE},
    "Accelerate and HF: the optimizer alone": STATE,
    "apex's FP16_Optimizer": {
        "model": MODEL,
        "optimizer": {"loss_scaler": {"cur_scale": 2.0}, "optimizer_state_dict": STATE, "overflow": False},
    },
    "nested four deep": {"trainer": {"workers": [{"learner": {"net": MODEL, "opt": STATE}}]}},
    "a tuple of state dicts": (MODEL, STATE),
    "a list": [MODEL, STATE],
    "named by get_optimizer_state_dict": {"model": MODEL, "optim": NAMED},
    "flattened by get_optimizer_state_dict": {"model": MODEL, "optim": FLAT},
    "keys that became texts": {"model": MODEL, "optim": TEXTS},
    "RNG states and statistics beside": {
        "model": MODEL,
        "optimizer": STATE,
        "rng_state": {"torch": torch.get_rng_state()},
        "obs_rms": {"mean": torch.zeros(3), "var": torch.ones(3), "count": torch.tensor(1.0)},
    },
    "a model with its epoch": {**MODEL, "epoch": 3, "optimizer": STATE},
    "two networks that one optimizer trains": {
        "trunk": {name: value for name, value in MODEL.items() if name[0] == "0"},
        "head": {name: value for name, value in MODEL.items() if name[0] == "1"},
        "optimizer": STATE,
    },
    "torchvision's EMA, with its count": {
        "model": MODEL,
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in COPY.items()}},
        "optimizer": STATE,
        "args": argparse.Namespace(lr=0.1),
    },
    "OpenNMT: a generator beside": {
        "model": {name: value for name, value in MODEL.items() if name[0] == "0"},
        "generator": {name: value for name, value in MODEL.items() if name[0] == "1"},
        "optim": {"training_step": 2, "decay_step": 2, "optimizer": STATE},
    },
    "Megatron: modules as nested dicts": {
        "model": {
            "encoder": {
                "first": {"weight": MODEL["0.weight"], "bias": MODEL["0.bias"]},
                "last": {"weight": MODEL["1.weight"], "bias": MODEL["1.bias"]},
            }
        },
        "optimizer": {"optimizer": STATE, "fp32_from_fp16_params": [list(COPY.values())]},
    },
    "Composer: by name, by class": {
        "state": {"model": MODEL, "optimizers": {"RMSprop": NAMED}},
        "rng": [{"cuda": []}],
    },
    "TorchRL: one module with others in it": {
        "loss": {
            **{f"actor.module.{name}": value for name, value in MODEL.items()},
            **{f"qvalue.{name}": value for name, value in MODEL2.items()},
            **{f"target_qvalue.{name}": value * 0.5 for name, value in MODEL2.items()},
        },
        "optim": STATE,
    },
    "a network that another optimizer trains": {"actor": MODEL, "critic": MODEL2, "actor_opt": STATE},
    "a replay buffer beside": {"buffer": {"obs": torch.randn(9, 3)}, "model": MODEL, "optimizer": STATE},
    "NumPy's numbers beside": {"model": MODEL, "optimizer": STATE, "last_mean_rewards": np.float32(1.0)},
    "groups as a tuple": {
        "model": MODEL,
        "optimizer": {"state": STATE["state"], "param_groups": tuple(STATE["param_groups"])},
    },
    "the rate as a tensor": {
        "model": MODEL,
        "optimizer": {
            "state": STATE["state"],
            "param_groups": [{**STATE["param_groups"][0], "lr": torch.tensor(0.1)}],
        },
    },
    "names with module. before": {
        "model": MODEL,
        "optimizer": {
            "state": {f"module.{name}": entry for name, entry in NAMED["state"].items()},
            "param_groups": [{**NAMED["param_groups"][0], "params": [f"module.{name}" for name in MODEL]}],
        },
    },
    "keys that are numbers": {0: MODEL, 1: STATE},
    "a copy of the model in a list": {"policy_history": [COPY], "policy": MODEL, "optimizer": STATE},
}


def expected(slot="square_avg"):
    """Return the state in the model's order."""
    return [entry[slot].numpy() for entry in STATE["state"].values()]


def params_of(held, at):
    """Return the parameter of a state's name, with or without the wrapper's prefix."""
    name = list(held.slots)[at]
    return held.params[name if name in held.params else name.removeprefix("module.")]


@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, lambda i, _: i % 3 == 0))
def test_state_and_model_are_found_under_any_key(layout, tmp_path):
    """Each parameter has its own state and values, and training continues from the converted file."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(LAYOUTS[layout], path)
    held = read_checkpoint(path)
    for (name, slots), value in zip(held.slots.items(), expected(), strict=True):
        np.testing.assert_array_equal(slots["square_avg"], value, err_msg=name)
    if "alone" not in layout:
        for at, value in enumerate(MODEL.values()):
            np.testing.assert_array_equal(params_of(held, at), value.numpy(), err_msg=str(at))
    write(prepare(path), out)
    whole = torch.load(out, weights_only=True)
    for at, value in enumerate(expected()):
        np.testing.assert_array_equal(whole["optimizer"]["state"][at]["square_avg"].numpy(), value)
    assert [row.name for row in inspect(path).rows] == list(held.slots)


SEVERAL = {
    "GAN": ({"netG": MODEL, "netD": MODEL2, "optimizerG": STATE, "optimizerD": STATE2}, "optimizerG"),
    "GAN of equal shapes": (
        {"generator": MODEL, "discriminator": COPY, "optimizer_g": STATE, "optimizer_d": STATE2},
        "optimizer_g",
    ),
    "Lightning, two": ({"state_dict": MODEL, "optimizer_states": [STATE2, STATE]}, "optimizer_states[1]"),
    "MMEngine, several": ({"state_dict": MODEL, "optimizer": {"a": STATE2, "b": STATE}}, "optimizer.b"),
    "SAC": (
        {
            "actor": MODEL,
            "critic1": MODEL2,
            "critic2": MODEL2,
            "actor_optim": STATE,
            "critic1_optim": STATE2,
            "critic2_optim": STATE2,
        },
        "actor_optim",
    ),
    "shards": ({"model": MODEL, "optimizer_state_dict": [STATE, STATE2]}, "optimizer_state_dict[0]"),
}


@pytest.mark.parametrize("layout", SEVERAL)
def test_several_optimizers_are_listed_and_one_is_chosen(layout, tmp_path):
    """Without a choice, the error lists each optimizer; with one, its state and its model are read."""
    content, place = SEVERAL[layout]
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(content, path)
    code, text = invoke("convert", str(path), str(out))
    said = " ".join(text.replace("│", " ").split())
    assert code == 2
    assert f"'{place}' (RMSprop, 4 parameters)" in said
    assert "(Adam, 2 parameters)" in said
    assert "--optimizer" in said
    for command in (("convert", str(path), str(out)), ("inspect", str(path))):
        code, text = invoke(*command, "--optimizer", place)
        assert code == 0, text
    held = read_checkpoint(path, optimizer=place)
    for (name, slots), value, own in zip(held.slots.items(), expected(), MODEL.values(), strict=True):
        np.testing.assert_array_equal(slots["square_avg"], value, err_msg=name)
        np.testing.assert_array_equal(held.params[name], own.numpy(), err_msg=name)


def test_several_models_that_fit_alike_are_listed_and_one_is_chosen(tmp_path):
    """Left and right fit equally, so neither is read without a choice."""
    path = tmp_path / "in.pt"
    torch.save({"left": COPY, "right": MODEL, "optimizer": STATE}, path)
    with pytest.raises(
        Unreadable, match=r"2 models: 'left' \(4 tensors\), 'right' \(4 tensors\).*--parameters 'left'"
    ):
        prepare(path)
    held = read_checkpoint(path, parameters="right")
    np.testing.assert_array_equal(held.params["0.weight"], MODEL["0.weight"].numpy())
    code, text = invoke("inspect", str(path), "--parameters", "right")
    assert code == 0, text


def test_a_choice_that_is_not_in_the_file_is_refused_with_what_is(tmp_path):
    """--optimizer, --parameters, and a file of another format each have their sentence."""
    path = tmp_path / "in.pt"
    torch.save({"model": MODEL, "optimizer": STATE}, path)
    with pytest.raises(ValueError, match=r"--optimizer 'x' is not in in\.pt; its optimizers are 'optimizer'"):
        prepare(path, optimizer="x")
    with pytest.raises(ValueError, match=r"--parameters 'x' is not in in\.pt; its models are 'model'"):
        prepare(path, parameters="x")
    made = tmp_path / "out.safetensors"
    assert invoke("convert", str(path), str(made))[0] == 0
    with pytest.raises(ValueError, match=r"--optimizer 'x' chooses among the contents of a torch\.save file"):
        prepare(made, optimizer="x")


def test_places_are_printable_and_can_be_typed(tmp_path):
    """A key with control characters is listed by its escapes, and chosen by what is listed."""
    path = tmp_path / "in.pt"
    torch.save({"mo\x1b[31mdel": MODEL, "a\x1b[2J": STATE, "b\n": STATE2}, path)
    with pytest.raises(Unreadable) as caught:
        prepare(path)
    assert str(caught.value).isprintable()
    place = re.search("--optimizer '(.*)'", str(caught.value))[1]
    assert len(read_checkpoint(path, optimizer=place).slots) == 4


def test_an_optimizer_that_has_not_stepped_is_not_a_missing_one(tmp_path):
    """The error distinguishes an optimizer without state from a missing one."""
    path = tmp_path / "in.pt"
    torch.save({"model": MODEL, "optimizer": torch.optim.RMSprop(net().parameters()).state_dict()}, path)
    for read in (prepare, inspect):
        with pytest.raises(Unreadable, match="holds an optimizer that has not taken a step"):
            read(path)
    torch.save({"model": MODEL, "optimizer": None}, path)
    with pytest.raises(Unreadable, match="holds parameters and no optimizer state"):
        prepare(path)


def test_a_partition_of_deepspeed_is_named_as_one(tmp_path):
    """Its flat state is read with a note that identifies it; anything that is not a state dict is refused."""
    flat = torch.nn.Parameter(torch.cat([value.reshape(-1) for value in MODEL.values()]))
    optimizer = torch.optim.RMSprop([flat])
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard = {
        "base_optimizer_state": optimizer.state_dict(),
        "single_partition_of_fp32_groups": [flat],
        "zero_stage": 2,
    }
    torch.save({"optimizer_state_dict": shard, "ds_config": {}}, path)
    plan = prepare(path)
    assert any(
        "one process's partition of DeepSpeed's ZeRO: its state is one flat array" in said
        for said in plan.report.assumed
    )
    torch.save({"optimizer_state_dict": {**shard, "base_optimizer_state": [{"square_avg": flat}]}}, path)
    with pytest.raises(Unreadable, match=r"no state of whole parameters.*zero_to_fp32\.py.*ds_to_universal"):
        prepare(path)


def test_a_model_that_only_code_can_make_leaves_the_optimizer_readable(tmp_path):
    """A trainer's pickled module is left out with a note; the state keeps its numbers."""
    path = tmp_path / "last.pt"
    torch.save({"epoch": 1, "model": net(), "ema": net(), "optimizer": STATE}, path)
    plan = prepare(path)
    assert any("'model' is skipped: loading it would run code" in said for said in plan.report.assumed)
    assert len(plan.checkpoint.slots) == 4
    torch.save([net(), None], path)
    with pytest.raises(Unreadable, match=r"would run code \('torch\.nn"):
        prepare(path)


RULE = {"learning_rate": 0.1, "decay": 0.9, "eps": 1e-8}


def train_state(place, width, **others):
    """Return the arrays of a Flax TrainState at a path; others are collections beside the parameters."""
    draw, made = np.random.default_rng(width), {f"{place}step": np.array(7)}
    for name, shape in {"dense/kernel": (3, width), "dense/bias": (width,)}.items():
        made[f"{place}params/{name}"] = draw.normal(size=shape).astype(np.float32)
        made[f"{place}opt_state/0/nu/{name}"] = draw.random(shape).astype(np.float32)
        made |= {f"{place}{other}/{name}": np.full(shape, value, np.float32) for other, value in others.items()}
    return made


def test_each_train_state_of_a_jax_file_is_listed_and_has_its_own_parameters(tmp_path):
    """Of an actor's and a critic's one is chosen, and arrays outside of it are omitted."""
    path, arrays = tmp_path / "x.npz", train_state("actor/", 4) | train_state("critic/", 5, target_params=0.5)
    np.savez(path, **arrays)
    with pytest.raises(Unreadable, match=r"2 optimizers: 'actor/opt_state', 'critic/opt_state'; choose one"):
        prepare(path, given=RULE)
    plan = prepare(path, given=RULE, optimizer="critic/opt_state")
    held = plan.checkpoint
    np.testing.assert_array_equal(held.params["dense.weight"], arrays["critic/params/dense/kernel"].T)
    np.testing.assert_array_equal(
        held.slots["dense.weight"]["square_avg"], arrays["critic/opt_state/0/nu/dense/kernel"].T
    )
    assert held.step == 7
    for choice in ({"optimizer": "x"}, {"parameters": "critic"}):
        with pytest.raises(Unreadable, match=r"'x' is not in|--parameters 'critic' applies only to torch.save"):
            prepare(path, given=RULE, **choice)


@pytest.mark.parametrize("place", ["", "critic/", "agents/0/critic/"])
def test_a_jax_target_network_is_not_taken_for_what_is_trained(place, tmp_path):
    """The parameters are those in the collection params beside the state."""
    path, arrays = tmp_path / "x.npz", train_state(place, 5, target_params=0.5, ema_params=0.25)
    np.savez(path, **arrays)
    held = prepare(path, given=RULE).checkpoint
    np.testing.assert_array_equal(held.params["dense.weight"], arrays[f"{place}params/dense/kernel"].T)


def test_nested_data_is_searched_once(tmp_path):
    """Lists that hold one list twice, forty deep, have 2⁴⁰ paths and are searched in no time."""
    path, knot = tmp_path / "in.pt", []
    for _ in range(40):
        knot = [knot, knot]
    torch.save({"model": MODEL, "optimizer": STATE, "knot": knot, "cut": [[] for _ in range(20_000)]}, path)
    assert len(read_checkpoint(path).slots) == 4


def sb3_zip(path, **parts):
    """Write a zip as Stable-Baselines3's model.save does."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("data", json.dumps({"policy_class": {":type:": "x"}}))
        for name, value in parts.items():
            with made.open(f"{name.replace('__', '.')}.pth", "w", force_zip64=True) as file:
                torch.save(value, file)
        made.writestr("_stable_baselines3_version", "2.4.0")
    return path


class ActorCritic(torch.nn.Module):
    """Make an actor's and a critic's network, and the critic's copy."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic, self.critic_target = net("a"), net("b"), net("b")


def test_each_optimizer_of_a_stable_baselines3_zip_has_its_part_of_the_policy(tmp_path):
    """SAC, TD3 and DDPG keep one for the actor, one for the critic and one for the entropy's coefficient."""
    policy, log = ActorCritic(), torch.nn.Parameter(torch.zeros(1))
    optimizers = {name: trained(getattr(policy, name)) for name in ("actor", "critic")}
    alpha = torch.optim.Adam([log], lr=0.1)
    log.grad = torch.ones(1)
    alpha.step()
    path = sb3_zip(
        tmp_path / "sac.zip",
        policy=policy.state_dict(),
        actor__optimizer=optimizers["actor"].state_dict(),
        critic__optimizer=optimizers["critic"].state_dict(),
        ent_coef_optimizer=alpha.state_dict(),
        pytorch_variables={"log_ent_coef": log},
    )
    with pytest.raises(Unreadable, match=r"3 optimizers: 'actor.optimizer' \(RMSprop, 4 parameters\), 'critic"):
        read_checkpoint(path)
    for name, optimizer in optimizers.items():
        held = read_checkpoint(path, optimizer=f"{name}.optimizer")
        module = getattr(policy, name)
        assert list(held.slots) == [f"{name}.{own}" for own, _ in module.named_parameters()]
        for slots, param in zip(held.slots.values(), module.parameters(), strict=True):
            np.testing.assert_array_equal(slots["square_avg"], optimizer.state[param]["square_avg"].numpy())
        assert len(held.params) == len(policy.state_dict())
    held = read_checkpoint(path, optimizer="ent_coef_optimizer")
    assert list(held.slots) == ["log_ent_coef"]


def test_a_stable_baselines3_zip_without_optimizer_is_a_model(tmp_path):
    """A file of model.save(exclude=...) is reported as a model, and inspect refuses it."""
    path = sb3_zip(tmp_path / "bare.zip", policy=ActorCritic().state_dict(), pytorch_variables={})
    with pytest.raises(Unreadable, match="holds parameters and no optimizer state"):
        prepare(path)
