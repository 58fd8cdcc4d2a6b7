"""RMSprop in TensorFlow, Keras and Sonnet."""

from collections.abc import Mapping

from rmsprop.dialects.row import ANYTHING, NONE_IS_OFF, Dialect, Limit, Own, Value, When, optional
from rmsprop.spec import Hyper, Rule

_KERAS_WORDS = {"learning_rate": "lr", "rho": "alpha", "epsilon": "eps"}
_CLIPPING = {"clipnorm": "clip_norm", "clipvalue": "clip_value", "global_clipnorm": "clip_global_norm"}
_TIME_DECAY = (
    "decay= divides the learning rate by 1 + decay·t in Keras; take torch.optim.lr_scheduler.LambdaLR(optimizer, "
    "lambda t: 1 / (1 + decay * t)), and rho=... for the averages' decay"
)
_EMA = "keep averaged weights with torch.optim.swa_utils.AveragedModel"
_NAME = Limit(ANYTHING, "a label, without effect here")
_KERAS_LIMITS: Mapping[str, Limit] = {
    "use_ema": Limit(False, _EMA),
    "ema_momentum": Limit(0.99, _EMA),
    "ema_overwrite_frequency": Limit((None, 100), _EMA),
    "name": _NAME,
    "loss_scale_factor": Limit(None, "scale the loss with torch.amp.GradScaler"),
    "gradient_accumulation_steps": Limit(None, "call step() after that many calls of backward()"),
    "jit_compile": Limit((True, False), "the kernels are compiled already; leave it out"),
    "is_legacy_optimizer": Limit(False, "that is dialect='keras2'"),
}
_SQUARES = "TensorFlow squares complex gradients as complex numbers"
_KERAS_EPS = Value(lambda eps: 1e-7 if eps is None else eps)
_KERAS2_EPS = Value(lambda eps: eps or 1e-7)

ROWS = (
    Dialect(
        name="tensorflow1",
        title="TensorFlow 1, tf.compat.v1.train.RMSPropOptimizer and the raw ops",
        rule=Rule(eps_mode="inside", square_avg_init=1.0, lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.9, eps=1e-10),
        source="tensorflow 2.21.0, python/training/rmsprop.py and core/kernels/training_ops.cc (008130e)",
        arguments={"learning_rate": "lr", "decay": "alpha", "epsilon": "eps"},
        limits={"use_locking": Limit(False, "nothing here runs unlocked beside it; leave it out"), "name": _NAME},
        settings={"sparse": "lazy"},
        states={"rms": "square_avg", "mg": "grad_avg", "momentum": "momentum_buffer"},
        complex=_SQUARES,
        call="tf.compat.v1.train.RMSPropOptimizer",
        own=Own(takes=("momentum", "centered")),
        example="learning_rate=7e-4, decay=0.99, epsilon=1e-5",
        traps=(
            "v starts at 1: for gradients below 1 the first steps are small, like a warm-up.",
            "The learning rate is inside the momentum buffer: after a schedule's cut the old momentum keeps the "
            "old rate.",
            "A checkpoint names its slots by the order of creation: NAME/RMSProp is the average of squares; _1 "
            "is the "
            "momentum, or, if centered, the average gradient, and _2 the momentum. It holds no step count.",
            "Sparse gradients are lazy: rows that were not looked up keep their averages and momentum.",
        ),
    ),
    Dialect(
        name="keras1",
        title="Keras 1 and 2 before TensorFlow 2 (multi-backend), keras.optimizers.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-8),
        source="Keras 2.2.4 and 2.3.1, keras/optimizers.py; a stored copy of late 1.x, whose epsilon is 1e-8",
        arguments={**_KERAS_WORDS, "clipnorm": "clip_global_norm", "clipvalue": "clip_value"},
        values={"epsilon": _KERAS_EPS, "clipnorm": NONE_IS_OFF, "clipvalue": NONE_IS_OFF},
        settings={"clip_value_last": True},
        limits={
            "decay": Limit(0.0, _TIME_DECAY),
            "momentum": Limit(0, "this optimizer has none; Keras 3's has (dialect='keras3')"),
            "centered": Limit(False, "this optimizer is never centered; Keras 3's can be (dialect='keras3')"),
        },
        states={"a": "square_avg"},
        complex=_SQUARES,
        call="keras.optimizers.RMSprop",
        own=Own(takes=("clip_global_norm", "clip_value")),
        example="lr=1e-3, rho=0.9",
        traps=(
            "clipnorm is the norm over all gradients together, and comes before clipvalue; from tf.keras on it "
            "is each "
            "tensor's own, and comes after.",
            "ε has been on both sides of the root: inside with 1e-6 in the first releases, which "
            "dialect='textbook' with "
            "epsilon=1e-6 computes, then outside.",
            "Late Keras 1 has epsilon=1e-8; Keras 2.2 and 2.3 have the same rule with 1e-7: give epsilon=None or "
            "1e-7.",
        ),
    ),
    Dialect(
        name="keras2",
        title="tf.keras up to 2.10 (OptimizerV2; tf_keras.optimizers.legacy.RMSprop)",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-7),
        source="tf_keras 2.21.0, optimizers/legacy/rmsprop.py and optimizer_v2.py",
        arguments={**_KERAS_WORDS, **_CLIPPING},
        values={"epsilon": _KERAS2_EPS, "eps": _KERAS2_EPS},
        limits={"decay": Limit(0.0, _TIME_DECAY), "name": _NAME},
        exclusive=("clipnorm", "global_clipnorm"),
        when=(When("momentum", {"eps_mode": "inside", "lr_in_buffer": True, "sparse": "lazy"}),),
        settings={"sparse": "dense"},
        states={"rms": "square_avg", "momentum": "momentum_buffer", "mg": "grad_avg"},
        complex=_SQUARES,
        call="tf.keras.optimizers.RMSprop",
        own=Own(takes=("momentum", "centered", "clip_norm", "clip_value", "clip_global_norm"), least_eps=1e-30),
        example="learning_rate=1e-3, rho=0.9, momentum=0.9",
        traps=(
            "Its rule depends on momentum: without, ε stands outside the root; with it, TensorFlow's fused operator "
            "runs, where ε stands inside. Both are followed here; what counts is the momentum at construction.",
            "epsilon=0 or None becomes 1e-7 there, and here.",
            "clipvalue comes before clipnorm or global_clipnorm.",
            "Sparse gradients: dense decay of the averages without momentum, lazy rows with it.",
        ),
    ),
    Dialect(
        name="keras3",
        title="Keras 3, keras.optimizers.RMSprop, and tf_keras' newer optimizer",
        rule=Rule(eps_mode="inside", lr_in_buffer=True, weight_decay_mode="decoupled"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-7),
        source="keras 3.15.1, keras/src/optimizers/rmsprop.py; tf_keras 2.21.0, optimizers/rmsprop.py",
        arguments={**_KERAS_WORDS, **_CLIPPING},
        values={"weight_decay": optional(0.0)},
        limits=_KERAS_LIMITS,
        exclusive=("clipnorm", "clipvalue", "global_clipnorm"),
        settings={"sparse": "dense"},
        states={
            "iteration": "step",
            "velocity": "square_avg",
            "momentum": "momentum_buffer",
            "average_gradient": "grad_avg",
        },
        complex=_SQUARES,
        call="keras.optimizers.RMSprop",
        own=Own(takes=("momentum", "centered", "weight_decay", "clip_norm", "clip_value", "clip_global_norm")),
        example="learning_rate=1e-3, rho=0.9, momentum=0.9, epsilon=1e-7",
        traps=(
            "What it calls velocity is the average of squared gradients; the velocity is called momentum.",
            "clipvalue together with a norm is an error in Keras 3, and silently ignored in tf_keras; an error here.",
            "weight_decay shrinks the weights by learning_rate·weight_decay, before the step and after clipping.",
            "Keras 3 squares duplicate rows of a sparse gradient before summing them, tf_keras after; here after.",
            "Its documentation says that the decay rate equals 1 − momentum; it does not.",
        ),
    ),
    Dialect(
        name="sonnet2",
        title="Sonnet 2, snt.optimizers.RMSProp",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.9, eps=1e-10),
        source="dm-sonnet 2.0.2, sonnet/src/optimizers/rmsprop.py",
        arguments={"learning_rate": "lr", "decay": "alpha", "epsilon": "eps"},
        limits={"name": _NAME},
        settings={"sparse": "lazy"},
        states={"mom": "momentum_buffer", "ms": "square_avg", "mg": "grad_avg"},
        complex=_SQUARES,
        call="snt.optimizers.RMSProp",
        own=Own(takes=("momentum", "centered")),
        example="learning_rate=1e-3, decay=0.9",
        traps=("v starts at 0; Sonnet 1 users had TensorFlow 1's start at 1.",),
    ),
)
