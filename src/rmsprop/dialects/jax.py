"""RMSprop in JAX's libraries and in MLX."""

from rmsprop.dialects.row import Dialect, Own, optional, when_true
from rmsprop.spec import Hyper, Rule

ROWS = (
    Dialect(
        name="optax",
        title="optax.rmsprop",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.9, eps=1e-8),
        source="optax 0.2.8 (2edbcbe), optax/_src/alias.py and transform.py",
        arguments={
            "learning_rate": "lr",
            "decay": "alpha",
            "initial_scale": "square_avg_init",
            "eps_in_sqrt": "eps_mode",
        },
        values={"eps_in_sqrt": when_true("inside", "outside"), "momentum": optional(0.0)},
        states={"count": "step", "mu": "grad_avg", "nu": "square_avg", "trace": "momentum_buffer"},
        buffer_sign=-1,
        complex="optax averages |g|², a single number for the real and imaginary parts",
        call="optax.rmsprop",
        own=Own(takes=("momentum", "centered", "nesterov", "eps_mode", "square_avg_init", "bias_correction")),
        example="learning_rate=1e-3, decay=0.99, eps=1e-5, initial_scale=1.0",
        traps=(
            "eps_in_sqrt defaults to True, so ε is in units of g². initial_scale=1.0 gives TensorFlow 1's rule.",
            "The trace holds the signed step, including the learning rate; torch's buffer has the opposite sign.",
            "In a chain with scale_by_learning_rate after the trace, the learning rate is outside the buffer, as in "
            "torch.",
        ),
    ),
    Dialect(
        name="jax",
        title="jax.example_libraries.optimizers: rmsprop and rmsprop_momentum",
        rule=Rule(eps_mode="inside", lr_in_buffer=True),
        hyper=Hyper(lr=None, alpha=0.9, eps=1e-8),
        source="jax 0.10.2, jax/example_libraries/optimizers.py",
        arguments={"step_size": "lr", "gamma": "alpha"},
        states={"avg_sq_grad": "square_avg", "mom": "momentum_buffer"},
        complex="jax squares complex gradients as complex numbers",
        call="jax.example_libraries.optimizers.rmsprop",
        own=Own(
            composed={
                "momentum": "jax.example_libraries.optimizers.rmsprop_momentum({arguments}, momentum={momentum})"
            }
        ),
        example="step_size=1e-3, gamma=0.9",
        traps=(
            "rmsprop_momentum is the same rule with momentum=0.9 by default; here the default is 0, as in rmsprop.",
        ),
    ),
    Dialect(
        name="mlx",
        title="MLX, mlx.optimizers.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=None, alpha=0.99, eps=1e-8),
        source="ml-explore/mlx 846d176 (0.32.4), python/mlx/optimizers/optimizers.py",
        arguments={"learning_rate": "lr"},
        states={"v": "square_avg"},
        complex="MLX squares complex gradients as complex numbers",
        call="mlx.optimizers.RMSprop",
        own=Own(least_eps=1e-30),
        example="learning_rate=1e-3, alpha=0.99",
        traps=("MLX requires eps > 0. It has no momentum, centering or weight decay; here these follow torch.",),
    ),
)
