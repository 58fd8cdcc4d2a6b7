"""RMSprop in TensorFlow, Keras and Sonnet."""

from collections.abc import Mapping

from rmsprop.dialects.row import ANYTHING, NONE_IS_OFF, Dialect, Limit, Own, Value, When, optional, when_true
from rmsprop.spec import Hyper, Rule

_KERAS_WORDS = {"learning_rate": "lr", "rho": "alpha", "epsilon": "eps"}
_CLIPPING = {"clipnorm": "clip_norm", "clipvalue": "clip_value", "global_clipnorm": "clip_global_norm"}
_TIME_DECAY = (
    "in Keras, decay= divides the learning rate by 1 + decay·t; use torch.optim.lr_scheduler.LambdaLR(optimizer, "
    "lambda t: 1 / (1 + decay * t)), and give rho=... for the decay of the averages"
)
_NAME = Limit(ANYTHING, "it is a label without effect")
_KERAS_LIMITS: Mapping[str, Limit] = {
    "ema_overwrite_frequency": Limit(None, "call optimizer.average_into(None) once per that many steps"),
    "name": _NAME,
    "loss_scale_factor": Limit(None, "scale the loss with torch.amp.GradScaler"),
    "gradient_accumulation_steps": Limit(None, "call step() once per that many backward() calls"),
    "jit_compile": Limit((True, False), "the kernels are already compiled; leave it out"),
    "is_legacy_optimizer": Limit(False, "use dialect='keras2' instead"),
}
_SQUARES = "TensorFlow squares complex gradients as complex numbers"
# The decay of use_ema=True alone; ema_momentum replaces it.
_USE_EMA = Value(
    when_true(0.99, None).read, lambda ema: {"use_ema": ema is not None} | ({"ema_momentum": ema} if ema else {})
)
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
        limits={"use_locking": Limit(False, "updates never run concurrently here; leave it out"), "name": _NAME},
        settings={"sparse": "lazy"},
        states={"rms": "square_avg", "mg": "grad_avg", "momentum": "momentum_buffer"},
        complex=_SQUARES,
        call="tf.compat.v1.train.RMSPropOptimizer",
        own=Own(takes=("momentum", "centered")),
        example="learning_rate=7e-4, decay=0.99, epsilon=1e-5",
        traps=(
            "v starts at 1, so the first steps are small for gradients below 1, like a warm-up.",
            "The momentum buffer includes the learning rate, so after a schedule lowers the rate, the old momentum "
            "keeps the old rate.",
            "A checkpoint names its slots in the order of creation. NAME/RMSProp is the average of squares; _1 is "
            "the momentum or, if centered, the average gradient; _2 is the momentum if centered. There is no step "
            "count.",
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
            "momentum": Limit(0, "this optimizer has no momentum; use dialect='keras3'"),
            "centered": Limit(False, "this optimizer has no centering; use dialect='keras3'"),
        },
        states={"a": "square_avg"},
        complex=_SQUARES,
        call="keras.optimizers.RMSprop",
        own=Own(takes=("clip_global_norm", "clip_value")),
        example="lr=1e-3, rho=0.9",
        traps=(
            "clipnorm bounds the global norm and applies before clipvalue; from tf.keras on it bounds each tensor's "
            "own norm and applies after clipvalue.",
            "The first releases had ε inside the root, with 1e-6; dialect='textbook' with epsilon=1e-6 computes "
            "that. Later releases have it outside.",
            "The default epsilon is 1e-8 in late Keras 1. Keras 2.2 and 2.3 have the same rule with 1e-7; give "
            "epsilon=None or 1e-7.",
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
            "The rule depends on the momentum at construction. Without momentum, ε is outside the root. With it, "
            "TensorFlow's fused operator runs, which has ε inside. This dialect follows both.",
            "epsilon=0 or None becomes 1e-7, in Keras and here.",
            "clipvalue applies before clipnorm or global_clipnorm.",
            "Sparse gradients are dense without momentum (the averages of every row decay) and lazy with it.",
        ),
    ),
    Dialect(
        name="keras3",
        title="Keras 3, keras.optimizers.RMSprop, and the newer optimizer of tf_keras",
        rule=Rule(eps_mode="inside", lr_in_buffer=True, weight_decay_mode="decoupled"),
        hyper=Hyper(lr=1e-3, alpha=0.9, eps=1e-7),
        source="keras 3.15.1, keras/src/optimizers/rmsprop.py; tf_keras 2.21.0, optimizers/rmsprop.py",
        arguments={**_KERAS_WORDS, **_CLIPPING, "use_ema": "ema", "ema_momentum": "ema"},
        values={
            "weight_decay": optional(0.0),
            "use_ema": _USE_EMA,
            **dict.fromkeys(_CLIPPING, NONE_IS_OFF),
        },
        idle=dict.fromkeys(("ema_momentum", "ema_overwrite_frequency"), "use_ema"),
        limits=_KERAS_LIMITS,
        exclusive=("clipnorm", "clipvalue", "global_clipnorm"),
        settings={"sparse": "dense"},
        states={
            "iteration": "step",
            "average": "ema",
            "velocity": "square_avg",
            "momentum": "momentum_buffer",
            "average_gradient": "grad_avg",
        },
        complex=_SQUARES,
        call="keras.optimizers.RMSprop",
        own=Own(takes=("momentum", "centered", "weight_decay", "clip_norm", "clip_value", "clip_global_norm", "ema")),
        example="learning_rate=1e-3, rho=0.9, momentum=0.9, epsilon=1e-7",
        traps=(
            "The slot named velocity is the average of squared gradients; the actual velocity is named momentum.",
            "Giving clipvalue together with a norm is an error in Keras 3 and here; tf_keras silently ignores it.",
            "weight_decay shrinks the weights by learning_rate·weight_decay, before the step and after clipping.",
            "tf_keras replaces the weights by their averages every 100 steps unless ema_overwrite_frequency is None, "
            "and both Keras do so at the end of fit; here only average_into does.",
            "Keras 3 squares duplicate rows of a sparse gradient before summing them. tf_keras and this package "
            "square them after.",
            "Its documentation states that the decay rate equals 1 − momentum, which is wrong.",
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
        traps=("v starts at 0; Sonnet 1 used TensorFlow 1's optimizer, where v starts at 1.",),
    ),
)
