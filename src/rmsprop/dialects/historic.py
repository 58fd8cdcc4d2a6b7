"""RMSprop in Caffe, Caffe2, Flux, DL4J and neon, and the optimizers that are called RMSprop but are not."""

from collections.abc import Mapping

from rmsprop.dialects.row import NEGATIVE_IS_OFF, Dialect, Limit, Own, Value
from rmsprop.spec import Hyper, Rule


def _regularization(kind: str) -> str:
    """Return the weight_decay_mode of a regularization_type of Caffe."""
    if kind not in ("L2", "L1"):
        raise ValueError(f"{kind!r} is neither 'L2' nor 'L1'")
    return kind.lower()


def _regularization_type(mode: str) -> str:
    """Return Caffe's regularization_type for a weight_decay_mode."""
    if mode not in ("l2", "l1"):
        raise ValueError(f"Caffe has no weight_decay_mode={mode!r}")
    return mode.upper()


ROWS = (
    Dialect(
        name="caffe",
        title="Caffe, solver type RMSProp",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=None, alpha=0.99, eps=1e-8),
        source="BVLC/caffe 9b89154, src/caffe/solvers/rmsprop_solver.cpp and sgd_solver.cpp",
        arguments={
            "base_lr": "lr",
            "rms_decay": "alpha",
            "delta": "eps",
            "clip_gradients": "clip_global_norm",
            "regularization_type": "weight_decay_mode",
        },
        values={
            "clip_gradients": NEGATIVE_IS_OFF,
            "regularization_type": Value(_regularization, _regularization_type),
        },
        limits={
            "momentum": Limit(0, "Caffe's solver does not start with momentum; leave it out"),
            "iter_size": Limit(1, "call step() once per that many backward() calls"),
        },
        states={"history": "square_avg"},
        complex="Caffe has no complex parameters",
        call='solver.prototxt: type: "RMSProp"',
        own=Own(
            takes=("weight_decay", "weight_decay_mode", "clip_global_norm"),
            text='type: "RMSProp"\nlr_policy: "fixed"\n{arguments}',
            pair="{}: {}",
            between="\n",
        ),
        example="base_lr=0.01, rms_decay=0.98, weight_decay=5e-4, clip_gradients=10.0",
        traps=(
            "clip_gradients bounds the global norm of the gradients before weight decay is added; 0 zeroes them.",
            "Use a parameter group with its own lr and weight_decay for a layer's lr_mult and decay_mult.",
            'regularization_type="L1" adds weight_decay·sign(p).',
        ),
    ),
    Dialect(
        name="caffe2",
        title="Caffe2, operator RmsProp",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=0.01, alpha=0.9, eps=1e-5),
        source="pytorch/pytorch 03d697c, caffe2/sgd/rmsprop_op.h and caffe2/python/optimizer.py",
        arguments={"base_learning_rate": "lr", "decay": "alpha", "epsilon": "eps"},
        refused={
            "alpha": "alpha is the learning rate in Caffe2's RmsPropOptimizer and the decay of the average in "
            "torch; give lr=... or decay=... instead"
        },
        states={"mean_squares": "square_avg", "momentum": "momentum_buffer"},
        complex="Caffe2 has no complex parameters",
        call="the operator RmsProp, with RmsPropOptimizer's",
        own=Own(
            takes=("momentum",),
            text="net.RmsProp([grad, mean_squares, mom, lr], [step, mean_squares, mom], decay={alpha}, "
            "momentum={momentum}, epsilon={eps})  # lr: a blob of {lr}; then param -= step",
        ),
        example="lr=0.01, decay=0.9, momentum=0.9, epsilon=1e-5",
        traps=(
            "This dialect is the operator. Its Python wrapper overwrites the operator's momentum blob with the "
            "scaled step, so the momentum in effect is alpha·momentum: 0.009 instead of 0.9. This bug is not "
            "reproduced.",
        ),
    ),
    Dialect(
        name="flux",
        title="Flux, Optimisers.jl RMSProp",
        rule=Rule(eps_mode="outside", lr_in_buffer=True),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-8),
        source="FluxML/Optimisers.jl b3595f5, src/rules.jl",
        arguments={"eta": "lr", "rho": "alpha", "epsilon": "eps", "centred": "centered"},
        states={"quad": "square_avg", "lin": "grad_avg", "velocity": "momentum_buffer"},
        complex="Flux averages |g|², a single number for the real and imaginary parts",
        call="Optimisers.RMSProp",
        own=Own(
            takes=("centered",),
            text="RMSProp(; {arguments})",
            truth=("false", "true"),
            composed={
                "momentum": "OptimiserChain({call}, Momentum(1, {momentum}))",
                "momentum nesterov": "OptimiserChain({call}, Nesterov(1, {momentum}))",
                "weight_decay": "OptimiserChain(WeightDecay({weight_decay}), {call})",
                "clip_norm": "OptimiserChain(ClipNorm({clip_norm}), {call})",
                "clip_value": "OptimiserChain(ClipGrad({clip_value}), {call})",
            },
        ),
        example="eta=1e-3, rho=0.9, epsilon=1e-8",
        traps=(
            "Its docstring calls rho “Momentum”; it is the decay of the average.",
            "weight_decay corresponds to OptimiserChain(WeightDecay(λ), RMSProp(...)). momentum corresponds to "
            "OptimiserChain(RMSProp(...), Momentum(1, ρ)), or Nesterov(1, ρ) with nesterov=True; the velocity "
            "includes the learning rate.",
        ),
    ),
    Dialect(
        name="dl4j",
        title="Deeplearning4j, ND4J RmsProp",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=0.1, alpha=0.95, eps=1e-8),
        source="deeplearning4j 1373917, nd4j RmsProp.java and RmsPropUpdater.java",
        arguments={"learningRate": "lr", "rmsDecay": "alpha", "epsilon": "eps"},
        v_init_is_eps=True,
        states={"G": "square_avg"},
        complex="ND4J has no complex parameters",
        call="new RmsProp",
        own=Own(text="new RmsProp({lr}, {alpha}, {eps})"),
        example="learningRate=0.1, rmsDecay=0.95, epsilon=1e-8",
        traps=(
            "v starts at ε. The default learning rate is 0.1.",
            "L1 and L2 regularization apply before the updater (weight_decay with mode l1 or l2). WeightDecay "
            "applies after it, which is weight_decay_mode='decoupled'. Gradient normalization precedes both.",
        ),
    ),
    Dialect(
        name="neon",
        title="Nervana neon, neon.optimizers.RMSProp",
        rule=Rule(eps_mode="both"),
        hyper=Hyper(lr=2e-3, alpha=0.95, eps=1e-6),
        source="NervanaSystems/neon 8c3fb8a, neon/optimizers/optimizer.py",
        arguments={
            "learning_rate": "lr",
            "decay_rate": "alpha",
            "epsilon": "eps",
            "gradient_clip_value": "clip_value",
            "param_clip_value": "clip_weights",
        },
        limits={
            "gradient_clip_norm": Limit(
                None,
                "neon scales the step by its norm factor but not the average, which amounts to a change of the "
                "learning rate; scale lr, or give clip_global_norm to clip the gradient itself",
            ),
            "stochastic_round": Limit(False, "neon's stochastic rounding is not reproduced; leave it out"),
        },
        states={"state": "square_avg"},
        complex="neon has no complex parameters",
        call="neon.optimizers.RMSProp",
        own=Own(takes=("clip_value", "clip_weights")),
        example="learning_rate=2e-3, decay_rate=0.95, epsilon=1e-6",
        traps=(
            "ε is both inside and outside the root.",
            "neon divides gradients by the batch size; in torch the loss does that.",
        ),
    ),
)

# Optimizers that are called RMSprop but compute something else -> the reason, for error messages and the docs.
UNFIT: Mapping[str, str] = {
    "cntk": "CNTK's rmsprop adapts a step size per element by the signs of successive gradients (Rprop with a root) "
    "and divides by the mean over the tensor, so elements affect one another; no RMSprop setting reproduces it. "
    "Use torch.optim.Rprop for the sign rule, or dialect='hinton2012' for the root",
    "climin_step_adapt": "climin's step adaptation raises and lowers each element's rate by the signs of successive "
    "steps; dialect='climin' is its RmsProp without the adaptation",
    "bitsandbytes8bit": "8-bit states are rounded to 256 values per block; `rmsprop convert` reads such "
    "checkpoints, and dialect='bitsandbytes' is the same rule with 32-bit state",
    "rmsprop_caution": "timm's cautious variant (crmsproptf) masks steps by their sign; dialect='timm' is the rule "
    "without the mask",
}
