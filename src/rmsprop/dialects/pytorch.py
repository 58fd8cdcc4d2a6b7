"""RMSprop in torch and in the packages around it."""

from collections.abc import Mapping
from typing import Any

from rmsprop.dialects.row import Dialect, Limit, Own, Value, when_true
from rmsprop.spec import Hyper, Rule

_TORCH_STATES = {
    "step": "step",
    "square_avg": "square_avg",
    "momentum_buffer": "momentum_buffer",
    "grad_avg": "grad_avg",
}

_NO_MOMENTUM = (
    "bitsandbytes accepts momentum= and never reads it, so its runs have none; leave it out, or use "
    'dialect="torch" to train with momentum'
)


def _decoupled(mode: str) -> Mapping[str, bool]:
    """Return timm's arguments for a weight_decay_mode."""
    if mode == "l1":
        raise ValueError("timm's RMSpropTF has no weight_decay_mode='l1'")
    return {"decoupled_decay": mode != "l2", "corrected_weight_decay": mode == "corrected"}


def _corrected(value: Any) -> Mapping[str, str]:
    """Return the mode that corrected_weight_decay=True selects; False leaves decoupled_decay in charge."""
    return {"weight_decay_mode": "corrected"} if when_true(True, False).read(value) else {}


ROWS = (
    Dialect(
        name="torch",
        title="PyTorch, torch.optim.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="torch/optim/rmsprop.py, the same formula from torch 1.2 to 2.15",
        states=_TORCH_STATES,
        call="torch.optim.RMSprop",
        own=Own(
            takes=("momentum", "centered", "weight_decay", "maximize"),
            text="torch.optim.RMSprop(params, {arguments})",
        ),
        example="lr=1e-3, alpha=0.9, eps=1e-5",
        traps=(
            "ε is outside the root, in units of g; TensorFlow's is inside, in units of g².",
            "The first step has length lr/√(1−alpha), ten times lr by default, whatever the gradient's size.",
            "Complex parameters are pairs of independent reals.",
        ),
    ),
    Dialect(
        name="timm",
        title="timm's RMSpropTF: TensorFlow 1's rule with torch's argument names",
        rule=Rule(eps_mode="inside", square_avg_init=1.0, lr_in_buffer=True),
        hyper=Hyper(lr=1e-2, alpha=0.9, eps=1e-10),
        source="timm 1.0.31, timm/optim/rmsprop_tf.py",
        arguments={
            "lr_in_momentum": "lr_in_buffer",
            "decoupled_decay": "weight_decay_mode",
            "corrected_weight_decay": "weight_decay_mode",
            "max_lr_snapshot": "reference_lr",
        },
        values={
            "decoupled_decay": Value(when_true("decoupled", "l2").read, _decoupled),
            "corrected_weight_decay": Value(_corrected, _decoupled),
        },
        requires={"corrected_weight_decay": "decoupled_decay"},
        limits={
            "caution": Limit(
                False,
                "caution masks steps whose sign differs from the gradient's, which is not RMSprop; leave it out",
            )
        },
        states=_TORCH_STATES,
        complex="timm squares complex gradients as complex numbers",
        call="timm.optim.RMSpropTF",
        own=Own(
            takes=("momentum", "centered", "lr_in_buffer", "weight_decay", "weight_decay_mode"),
            text="timm.optim.RMSpropTF(params, {arguments})",
        ),
        example="lr=0.048, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5",
        traps=(
            "v starts at 1, which acts as a warm-up of about 1/(1−alpha) steps for gradients below 1.",
            "timm's create_optimizer and training script pass momentum=0.9 by default; the class itself does not.",
            "corrected_weight_decay shrinks p by lr²/reference_lr·weight_decay; reference_lr is the learning rate at "
            "construction, in every group. It requires decoupled_decay=True. Without it, timm ignores the argument "
            "and this package raises.",
            "In timm's registry, rmsproptf is the plain rule, rmsproptfw adds decoupled_decay and rmsproptfc also "
            "adds corrected_weight_decay.",
        ),
    ),
    Dialect(
        name="sb3",
        title="Stable-Baselines3's RMSpropTFLike",
        rule=Rule(eps_mode="inside", square_avg_init=1.0),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="stable-baselines3 2.9.2, common/sb2_compat/rmsprop_tf_like.py",
        states=_TORCH_STATES,
        complex="RMSpropTFLike squares complex gradients as complex numbers",
        call="RMSpropTFLike",
        own=Own(takes=("momentum", "centered", "weight_decay"), text="RMSpropTFLike(params, {arguments})"),
        example="lr=7e-4, alpha=0.99, eps=1e-5",
        traps=(
            "SB3's A2C uses torch.optim.RMSprop unless policy_kwargs names this class.",
            "With momentum and a schedule it differs from TensorFlow: the learning rate stays outside the buffer.",
            "Its defaults for alpha and eps are torch's, not TensorFlow's.",
        ),
    ),
    Dialect(
        name="bitsandbytes",
        title="bitsandbytes' RMSprop with 32-bit state",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="bitsandbytes 0.50.2, bitsandbytes/optim/rmsprop.py and backends/default/ops.py",
        limits={
            "momentum": Limit(0, _NO_MOMENTUM),
            "centered": Limit(False, "bitsandbytes raises NotImplementedError for centered=True; leave it out"),
            "optim_bits": Limit(
                32,
                "8-bit states are rounded to 256 values; `rmsprop convert` reads such checkpoints, but no run keeps "
                "them",
            ),
            "args": Limit(None, "args overrides bitsandbytes' internals; leave it out"),
            "min_8bit_size": Limit(4096, "no state is kept in 8 bits here; leave it out"),
            "max_unorm": Limit(
                0.0, "max_unorm caps the norm of the step; use clip_norm or clip_global_norm to cap the gradient's"
            ),
        },
        states={"step": "step", "state1": "square_avg"},
        complex="bitsandbytes does not support complex parameters",
        call="bitsandbytes.optim.RMSprop",
        own=Own(takes=("weight_decay",), text="bitsandbytes.optim.RMSprop(params, {arguments})"),
        example="lr=1e-3, alpha=0.99, eps=1e-8",
        traps=(
            "bitsandbytes accepts momentum= and silently ignores it on every device; here it raises.",
            "alpha=0 raises NotImplementedError in bitsandbytes.",
        ),
    ),
    Dialect(
        name="heavyball",
        title="HeavyBall's RMSprop",
        rule=Rule(eps_mode="floor", bias_correction=True, weight_decay_mode="decoupled"),
        hyper=Hyper(lr=0.0025, alpha=0.99, eps=1e-6),
        source="heavyball 3.2.1, heavyball/__init__.py, chainable.py and utils.py",
        arguments={"betas": "alpha", "beta2": "alpha"},
        values={"betas": Value(lambda pair: tuple(pair)[1], lambda alpha: (0.9, alpha))},
        limits={
            "warmup_steps": Limit(0, "it changes the learning rate; use a torch.optim.lr_scheduler"),
            "caution": Limit(False, "it masks steps, which is not RMSprop; leave it out"),
            "mars": Limit(False, "it changes the gradient, which is not RMSprop; leave it out"),
            "palm": Limit(False, "it changes beta2 during training; schedule alpha instead"),
            "cautious_weight_decay": Limit(
                False, "it masks the weight decay by sign, which is not RMSprop; leave it out"
            ),
            "storage_dtype": Limit("float32", "the state is float32 here; leave it out"),
            "multi_tensor": Limit((True, False), "use foreach= instead"),
        },
        states={"exp_avg_sq": "square_avg"},
        keeps_corrected=True,
        complex="HeavyBall does not support complex parameters",
        call="heavyball.RMSprop",
        own=Own(takes=("weight_decay",), text="heavyball.RMSprop(params, {arguments})"),
        example="lr=0.0025, betas=(0.9, 0.99), eps=1e-6",
        traps=(
            "The average is divided by 1−betaᵗ, as in Adam; the state holds the divided average, v/(1−betaᵗ).",
            "ε is a lower bound on the root, not added to it. The first of the betas is never used.",
            "weight_decay is decoupled: p ← p·(1 − lr·weight_decay).",
        ),
    ),
    Dialect(
        name="torch7",
        title="Lua Torch, optim.rmsprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="torch/optim a5ceed7, rmsprop.lua",
        arguments={
            "learningRate": "lr",
            "epsilon": "eps",
            "weightDecay": "weight_decay",
            "initialMean": "square_avg_init",
        },
        states={"m": "square_avg"},
        complex="Lua Torch has no complex parameters",
        call="optim.rmsprop",
        own=Own(takes=("weight_decay", "square_avg_init"), text="optim.rmsprop(feval, x, {{{arguments}}})"),
        example="learningRate=1e-2, alpha=0.99, epsilon=1e-8",
        traps=("In versions of 2016, v started at 0, then at 1, then at 0 again; set it with initialMean.",),
    ),
)
