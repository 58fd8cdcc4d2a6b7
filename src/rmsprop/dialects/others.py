"""RMSprop in MXNet, Paddle, MindSpore, Chainer, Lasagne, Blocks and climin."""

from collections.abc import Mapping
from typing import Any

from rmsprop.dialects.row import NONE_IS_OFF, Dialect, Limit, Own, Value, When
from rmsprop.spec import Hyper, Rule

_EPS = {"learning_rate": "lr", "epsilon": "eps"}
_MX_MOMENTUM = Limit(
    (0, 0.9, None), "MXNet reads it only with centered=True and otherwise ignores it; leave it out", "centered"
)
_MX_CENTERED = When("centered", {"eps_mode": "inside", "lr_in_buffer": True, "momentum": 0.9})
_MX_RESCALE = Limit(1.0, "MXNet multiplies the gradients by it; scale the loss instead")
_MX_SQUARES = "MXNet has no complex parameters"


def _paddle_clip(clip: Any) -> Mapping[str, Any]:
    """Return the bound in a grad_clip of Paddle: a ClipGradBy object, or a dict of its class name and arguments."""
    if clip is None:
        return {}
    if isinstance(clip, Mapping):
        name, bounds = clip.get("name"), dict(clip)
    else:
        name, bounds = type(clip).__name__, {k: getattr(clip, k, None) for k in ("max", "min", "clip_norm")}
    if name == "ClipGradByValue":
        bound = bounds.get("max")
        if bound is not None and bounds.get("min") in (None, -bound):
            return {"clip_value": bound}
        raise ValueError(f"it clips to [{bounds.get('min')}, {bound}]; the bounds must be a number and its negative")
    if name in ("ClipGradByNorm", "ClipGradByGlobalNorm"):
        return {"clip_norm" if name == "ClipGradByNorm" else "clip_global_norm": bounds.get("clip_norm")}
    raise TypeError(
        "give a paddle.nn.ClipGradByValue, ClipGradByNorm or ClipGradByGlobalNorm, or a dict such as "
        '{"name": "ClipGradByNorm", "clip_norm": 1.0}'
    )


def _paddle_decay(decay: Any) -> Mapping[str, Any]:
    """Return the settings in a weight_decay of Paddle: a number, or an L1Decay or L2Decay."""
    if decay is None:
        return {}
    read = {"weight_decay": getattr(decay, "_coeff", getattr(decay, "coeff", decay))}
    return {**read, "weight_decay_mode": "l1"} if type(decay).__name__.startswith("L1Decay") else read


ROWS = (
    Dialect(
        name="mxnet1",
        title="MXNet 1, mx.optimizer.RMSProp",
        rule=Rule(eps_mode="inside"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-8),
        source="mxnet 1.9.1, python/mxnet/optimizer/optimizer.py; kernels by running them",
        arguments={
            **_EPS,
            "gamma1": "alpha",
            "gamma2": "momentum",
            "wd": "weight_decay",
            "clip_gradient": "clip_value",
        },
        values={"clip_gradient": NONE_IS_OFF, "clip_weights": NONE_IS_OFF},
        limits={"gamma2": _MX_MOMENTUM, "momentum": _MX_MOMENTUM, "rescale_grad": _MX_RESCALE},
        when=(_MX_CENTERED,),
        settings={"clip_after_decay": True},
        states={"n": "square_avg", "g": "grad_avg", "delta": "momentum_buffer"},
        buffer_sign=-1,
        complex=_MX_SQUARES,
        call="mx.optimizer.RMSProp",
        own=Own(takes=("momentum", "centered", "weight_decay", "clip_value", "clip_weights")),
        example="learning_rate=1e-3, gamma1=0.9, wd=1e-4, clip_gradient=1.0",
        traps=(
            "centered=True selects a different operator, Graves', with momentum gamma2=0.9 by default and the "
            "learning rate inside the buffer.",
            "MXNet ignores gamma2= without centered=True; here it raises.",
            "clip_gradient bounds the gradient after weight decay is added; MXNet 2 clips before.",
            "With param_idx2name, MXNet decays only parameters named _weight or _gamma. Put the others in a group "
            "with weight_decay=0.",
        ),
    ),
    Dialect(
        name="mxnet2",
        title="MXNet 2, mx.optimizer.RMSProp",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-8),
        source="apache/mxnet b84609d, python/mxnet/optimizer/rmsprop.py and src/operator/optimizer_op-inl.h",
        arguments={**_EPS, "rho": "alpha", "wd": "weight_decay", "clip_gradient": "clip_value"},
        values={"clip_gradient": NONE_IS_OFF, "clip_weights": NONE_IS_OFF},
        limits={"momentum": _MX_MOMENTUM, "rescale_grad": _MX_RESCALE},
        when=(_MX_CENTERED,),
        states={"mean": "grad_avg", "var": "square_avg", "mom": "momentum_buffer"},
        buffer_sign=-1,
        complex=_MX_SQUARES,
        call="mx.optimizer.RMSProp",
        own=Own(takes=("momentum", "centered", "weight_decay", "clip_value", "clip_weights")),
        example="learning_rate=1e-3, rho=0.9, wd=1e-4",
        traps=(
            "ε is outside the root without centering and inside with it.",
            "clip_gradient=0 zeroes the gradient in MXNet's Python step and disables clipping in its fused step; "
            "here it disables clipping.",
            "MXNet 2 loads a centered state saved by MXNet 1 with the first two slots swapped; `rmsprop convert` "
            "reorders them.",
        ),
    ),
    Dialect(
        name="paddle",
        title="PaddlePaddle, paddle.optimizer.RMSProp",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.95, eps=1e-6),
        source="paddlepaddle 3.3.1, python/paddle/optimizer/rmsprop.py and phi/kernels/impl/rmsprop_kernel_impl.h",
        arguments={**_EPS, "rho": "alpha", "grad_clip": "clip_value"},
        values={"grad_clip": Value(_paddle_clip), "weight_decay": Value(_paddle_decay)},
        settings={"sparse": "dense"},
        states={"momentum": "momentum_buffer", "mean_square": "square_avg", "mean_grad": "grad_avg"},
        complex="Paddle's RMSProp does not support complex parameters",
        call="paddle.optimizer.RMSProp",
        own=Own(
            takes=("momentum", "centered", "weight_decay"),
            text="paddle.optimizer.RMSProp({arguments}, parameters=model.parameters())",
            composed={
                "weight_decay l1": "weight_decay=paddle.regularizer.L1Decay({weight_decay})",
                "clip_value": "grad_clip=paddle.nn.ClipGradByValue({clip_value})",
                "clip_norm": "grad_clip=paddle.nn.ClipGradByNorm({clip_norm})",
                "clip_global_norm": "grad_clip=paddle.nn.ClipGradByGlobalNorm({clip_global_norm})",
            },
        ),
        example="learning_rate=1e-3, rho=0.95, epsilon=1e-6",
        traps=(
            "Its documentation states that it uses Nesterov momentum, which is wrong.",
            "Paddle holds rho, epsilon and momentum in float32 even for float64 parameters, and its 8-wide vector "
            "code takes an approximate root (error up to 3 ULP).",
            "grad_clip takes a ClipGradByValue, ClipGradByNorm or ClipGradByGlobalNorm, or a dict of its name and "
            "arguments, and applies before weight_decay is added. weight_decay takes a number, L2Decay or L1Decay.",
        ),
    ),
    Dialect(
        name="mindspore",
        title="MindSpore, nn.RMSProp",
        rule=Rule(eps_mode="inside", square_avg_init=1.0, lr_in_buffer=True),
        hyper=Hyper(lr=0.1, alpha=0.9, eps=1e-10),
        source="mindspore 2.10.0, python/mindspore/nn/optim/rmsprop.py; mindspore-ai/mindspore 07f9793",
        arguments={**_EPS, "decay": "alpha"},
        limits={
            "use_locking": Limit(False, "updates never run concurrently here; leave it out"),
            "loss_scale": Limit(1.0, "scale the loss with torch.amp.GradScaler"),
        },
        states={"mean_square": "square_avg", "moment": "momentum_buffer", "mean_grad": "grad_avg"},
        complex="MindSpore squares complex gradients as complex numbers",
        call="mindspore.nn.RMSProp",
        own=Own(
            takes=("momentum", "centered", "weight_decay"),
            text="mindspore.nn.RMSProp(net.trainable_params(), {arguments})",
            least_eps=1e-30,
        ),
        example="learning_rate=0.01, decay=0.9, epsilon=1e-10",
        traps=(
            "MindSpore 2.10's CPU operator has ε outside the root in vectorized elements and inside it in the "
            "remainder, and the split depends on its number of threads. Here ε is inside everywhere, as documented.",
            "With centered=True, its CPU operator skips elements whose variance is not positive; here such a "
            "variance counts as 0.",
            "MindSpore's weight_decay skips parameters named beta or gamma; put them in a group with weight_decay=0.",
        ),
    ),
    Dialect(
        name="mindspore_experimental",
        title="MindSpore, mindspore.experimental.optim.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="mindspore 2.10.0, python/mindspore/experimental/optim/rmsprop.py",
        states={"mean_square": "square_avg", "moment": "momentum_buffer", "mean_grad": "grad_avg"},
        complex="MindSpore squares complex gradients as complex numbers",
        call="mindspore.experimental.optim.RMSprop",
        own=Own(
            takes=("momentum", "centered", "weight_decay", "maximize"),
            text="mindspore.experimental.optim.RMSprop(net.trainable_params(), {arguments})",
        ),
        example="lr=1e-2, alpha=0.99",
        traps=("This is torch's rule; nn.RMSProp is TensorFlow 1's.",),
    ),
    Dialect(
        name="chainer",
        title="Chainer, optimizers.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=0.01, alpha=0.99, eps=1e-8),
        source="chainer a8e15cb (7.8.1), chainer/optimizers/rmsprop.py",
        arguments={"eps_inside_sqrt": "eps_mode"},
        values={"eps_inside_sqrt": Value(lambda inside: "inside" if inside else "outside", lambda m: m == "inside")},
        states={"t": "step", "ms": "square_avg"},
        complex="Chainer squares complex gradients as complex numbers",
        call="chainer.optimizers.RMSprop",
        own=Own(
            takes=("eps_mode",),
            text="optimizer = chainer.optimizers.RMSprop({arguments})",
            composed={
                "clip_value": "{call}\noptimizer.add_hook(chainer.optimizer_hooks.GradientHardClipping("
                "-{clip_value}, {clip_value}))",
                "clip_global_norm": "{call}\noptimizer.add_hook(chainer.optimizer_hooks.GradientClipping("
                "{clip_global_norm}))",
                "weight_decay": "{call}\noptimizer.add_hook(chainer.optimizer_hooks.WeightDecay({weight_decay}))",
            },
        ),
        example="lr=0.01, alpha=0.99, eps=1e-8",
        traps=(
            "weight_decay corresponds to the hook WeightDecay, clip_global_norm to GradientClipping and clip_value "
            "to GradientHardClipping. Hooks run in the order in which they were added; give clip_after_decay=True if "
            "WeightDecay came first.",
            "In Chainer, eps=0 is an error on a GPU only.",
        ),
    ),
    Dialect(
        name="chainer_graves",
        title="Chainer, optimizers.RMSpropGraves",
        rule=Rule(eps_mode="inside", centered=True, lr_in_buffer=True),
        hyper=Hyper(lr=1e-4, alpha=0.95, eps=1e-4, momentum=0.9),
        source="chainer a8e15cb (7.8.1), chainer/optimizers/rmsprop_graves.py",
        states={"t": "step", "n": "square_avg", "g": "grad_avg", "delta": "momentum_buffer"},
        buffer_sign=-1,
        complex="Chainer squares complex gradients as complex numbers",
        call="chainer.optimizers.RMSpropGraves",
        own=Own(takes=("momentum",)),
        example="lr=1e-4, alpha=0.95, momentum=0.9, eps=1e-4",
        traps=("It is always centered. delta holds the signed step, including the learning rate.",),
    ),
    Dialect(
        name="lasagne",
        title="Lasagne, lasagne.updates.rmsprop",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=1.0, alpha=0.9, eps=1e-6),
        source="Lasagne 5d3c63c, lasagne/updates.py",
        arguments={**_EPS, "rho": "alpha"},
        states={"accu": "square_avg", "velocity": "momentum_buffer"},
        buffer_sign=-1,
        complex="Theano squares complex gradients as complex numbers",
        call="lasagne.updates.rmsprop",
        own=Own(
            text="lasagne.updates.rmsprop(loss, params, {arguments})",
            composed={
                "momentum": "lasagne.updates.apply_momentum({call}, momentum={momentum})",
                "momentum nesterov": "lasagne.updates.apply_nesterov_momentum({call}, momentum={momentum})",
            },
        ),
        example="learning_rate=1e-3, rho=0.9",
        traps=(
            "The default learning rate is 1.",
            "momentum corresponds to the wrapper apply_momentum, or apply_nesterov_momentum with nesterov=True; both "
            "keep the learning rate inside the velocity.",
        ),
    ),
    Dialect(
        name="blocks",
        title="Blocks, blocks.algorithms.RMSProp, and pylearn2",
        rule=Rule(eps_mode="floor", lr_in_buffer=True),
        hyper=Hyper(lr=1.0, alpha=0.9, eps=1e-5),
        source="mila-iqia/blocks c69c2dc, blocks/algorithms/__init__.py; lisa-lab/pylearn2 af81e5c",
        arguments={"learning_rate": "lr", "decay_rate": "alpha", "decay": "alpha", "max_scaling": "eps"},
        values={"max_scaling": Value(lambda most: 1 / most, lambda eps: 1 / eps if eps else float("inf"))},
        states={"mean_square": "square_avg", "velocity": "momentum_buffer"},
        complex="Theano squares complex gradients as complex numbers",
        call="blocks.algorithms.RMSProp",
        own=Own(
            composed={
                "momentum": "blocks.algorithms.CompositeRule([{call}, blocks.algorithms.BasicMomentum({momentum})])"
            },
            least_eps=1e-30,
        ),
        example="learning_rate=1e-3, decay_rate=0.9, max_scaling=1e5",
        traps=(
            "The default learning rate is 1.",
            "max_scaling bounds the factor on a gradient: the root is at least 1/max_scaling.",
            "momentum corresponds to CompositeRule([RMSProp(...), BasicMomentum(...)]), whose buffer includes the "
            "learning rate.",
        ),
    ),
    Dialect(
        name="climin",
        title="climin.RmsProp",
        rule=Rule(eps_mode="inside", square_avg_init=1.0, lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.9, eps=1e-8),
        source="BRML/climin 2215b1a, climin/rmsprop.py",
        arguments={"step_rate": "lr", "decay": "alpha"},
        limits={
            name: Limit(
                neutral,
                "climin's step adaptation changes each element's rate by the signs of its steps, which is not "
                "RMSprop; leave it out",
            )
            for name, neutral in {"step_adapt": False, "step_rate_min": 0, "step_rate_max": float("inf")}.items()
        },
        when=(When("momentum", {"nesterov": True}),),
        states={"moving_mean_squared": "square_avg", "step": "momentum_buffer"},
        complex="climin does not support complex parameters",
        call="climin.RmsProp",
        own=Own(takes=("momentum",), fixed=("eps",), text="climin.RmsProp(wrt, fprime, {arguments})"),
        example="step_rate=1e-3, decay=0.9",
        traps=(
            "Its momentum is Nesterov's, with the gradient taken at the look-ahead point w − momentum·b. Here the "
            "parameters are the look-ahead points, so equal gradients give equal runs; climin's own w is the "
            "parameter plus momentum·b.",
            "climin fixes ε at 1e-8.",
        ),
    ),
)
