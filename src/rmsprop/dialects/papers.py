"""RMSprop as lectures and papers define it."""

from rmsprop.dialects.row import Dialect, Own
from rmsprop.spec import Hyper, Rule

_GREEK = {"learning_rate": "lr", "epsilon": "eps"}

ROWS = (
    Dialect(
        name="textbook",
        title="The textbook: w ← w − α·g/√(S + ε), S ← β·S + (1−β)·g²",
        rule=Rule(eps_mode="inside"),
        hyper=Hyper(lr=1e-3, alpha=0.99, eps=1e-8),
        source="common lecture notes, after Tieleman and Hinton, lecture 6e, 2012, with ε inside the root",
        arguments={"learning_rate": "lr", "beta": "alpha", "epsilon": "eps"},
        refused={
            "alpha": "alpha is the learning rate in the textbook's rule and the decay of the average in torch; "
            "give learning_rate=... or beta=... instead"
        },
        states={"S": "square_avg"},
        example="learning_rate=1e-3, beta=0.9, epsilon=1e-8",
        traps=("ε is inside the root, in units of g²: torch's 1e-8 caps the step here as 1e-4 does in torch.",),
    ),
    Dialect(
        name="hinton2012",
        title="Tieleman and Hinton, Neural Networks for Machine Learning, lecture 6e, 2012",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=None, alpha=0.9, eps=0.0),
        source="lecture slides 6e, slide 29, from memory: MeanSquare(w,t) = 0.9 MeanSquare(w,t−1) + 0.1 (∂E/∂w)²",
        arguments={"learning_rate": "lr"},
        states={"MeanSquare": "square_avg"},
        own=Own(fixed=("eps",)),
        example="learning_rate=1e-3",
        traps=(
            "The slide gives no ε, learning rate or initial v. Here v starts at 0, and 0/0 is a zero step.",
            "According to slide 30, momentum helps less than it normally does, and Nesterov momentum works best if "
            "the root divides the correction rather than the jump; momentum=0.9, nesterov=True computes that.",
        ),
    ),
    Dialect(
        name="graves2013",
        title="Graves, Generating sequences with recurrent neural networks, 2013",
        rule=Rule(eps_mode="inside", centered=True, lr_in_buffer=True),
        hyper=Hyper(lr=1e-4, alpha=0.95, eps=1e-4, momentum=0.9),
        source="arXiv:1308.0850, equations 38-45, constants as in chainer a8e15cb, rmsprop_graves.py",
        arguments=_GREEK,
        states={"n": "square_avg", "g": "grad_avg", "Delta": "momentum_buffer"},
        buffer_sign=-1,
        own=Own(takes=("momentum",)),
        example="learning_rate=1e-4, epsilon=1e-4",
        traps=(
            "The velocity holds the signed step, including the learning rate, so schedules affect new gradients "
            "only.",
        ),
    ),
    Dialect(
        name="dqn2015",
        title="DeepMind's DQN: Mnih et al., Human-level control, Nature 2015 (Lua)",
        rule=Rule(eps_mode="inside", centered=True),
        hyper=Hyper(lr=2.5e-4, alpha=0.95, eps=0.01),
        source="kuz/DeepMind-Atari-Deep-Q-Learner, dqn/NeuralQLearner.lua",
        arguments={"wc": "weight_decay", "learning_rate": "lr", "epsilon": "eps"},
        states={"g2": "square_avg", "g": "grad_avg"},
        own=Own(takes=("weight_decay",)),
        example="lr=2.5e-4",
        traps=(
            "The paper's “gradient momentum 0.95” is the decay of the mean gradient that centering subtracts. "
            "There is no heavy-ball momentum: the code multiplies the last step by 0.",
            "The paper's “min squared gradient 0.01” is ε, inside the root.",
            "The original clips the error to ±1, not the gradient.",
        ),
    ),
    Dialect(
        name="a3c2016",
        title="Mnih et al., Asynchronous methods for deep reinforcement learning, 2016 (shared RMSProp)",
        rule=Rule(eps_mode="inside"),
        hyper=Hyper(lr=None, alpha=0.99, eps=0.1),
        source="arXiv:1602.01783, section 4 and supplement 7, from memory; ε is not published, 0.1 is common",
        arguments={"learning_rate": "lr", "eta": "lr", "epsilon": "eps"},
        states={"g": "square_avg"},
        example="learning_rate=7e-4",
        traps=(
            "The paper draws the learning rate log-uniformly from 1e-4 to 1e-2 and anneals it to 0, so it has no "
            "default.",
            "All threads share g and update it without locks.",
        ),
    ),
)
