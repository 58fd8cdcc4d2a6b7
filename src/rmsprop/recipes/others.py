"""Recipes for sequences, generative models and language."""

from rmsprop.recipes.row import Recipe

_GRAVES = "it is centered, with ε inside the root and the learning rate inside the momentum buffer"

ROWS = (
    Recipe(
        name="graves-handwriting",
        title="Graves, Generating sequences with recurrent neural networks, 2013: text and handwriting",
        dialect="graves2013",
        settings={"learning_rate": 1e-4, "alpha": 0.95, "momentum": 0.9, "epsilon": 1e-4},
        source="arXiv:1308.0850, equations 38-45; constants as the defaults of chainer 0c89f4d, rmsprop_graves.py",
        fixes=_GRAVES,
        clipping="during backward: derivatives with respect to the network's output to ±100, the LSTM's inputs to "
        "±10",
        from_memory=("clipping",),
    ),
    Recipe(
        name="ntm",
        title="Graves et al., Neural Turing Machines, 2014",
        dialect="graves2013",
        settings={"learning_rate": 1e-4, "alpha": 0.95, "momentum": 0.9, "epsilon": 1e-4},
        source="arXiv:1410.5401, section 4.6",
        fixes=_GRAVES,
        batch="1",
        schedule="constant; 3e-5 in some experiments",
        clipping="every element of the gradient to ±10 (clip_value=10)",
        from_memory=("learning_rate", "momentum", "batch", "schedule", "clipping"),
        assumed=dict.fromkeys(("alpha", "epsilon"), "as in Graves 2013, whose form the paper cites"),
    ),
    Recipe(
        name="char-rnn",
        title="Karpathy's char-rnn",
        dialect="torch7",
        settings={"learningRate": 2e-3, "alpha": 0.95, "epsilon": 1e-8},
        source="karpathy/char-rnn, train.lua (from a fork, 0483593); ε is optim.rmsprop's default",
        fixes="ε is outside the root and v starts at 0",
        batch="50 sequences of 50 characters",
        schedule="x 0.97 at the end of every epoch from the tenth on",
        clipping="every element of the gradient to ±5 (clip_value=5); the gradient is summed over the 50 characters",
    ),
    Recipe(
        name="wgan",
        title="Wasserstein GAN, Arjovsky et al., 2017, generator and critic",
        dialect="torch",
        settings={"lr": 5e-5, "alpha": 0.99, "eps": 1e-8},
        source="martinarjovsky/WassersteinGAN 2cf43ba, main.py; arXiv:1701.07875",
        fixes="the paper chose RMSprop because momentum made the critic unstable",
        batch="64",
        clipping="the critic's weights to ±0.01 before each of its steps, not gradients; clip_weights=0.01 clips "
        "after each step",
        other="5 critic steps per generator step; 100 before the 25th generator step and at every 500th",
    ),
    Recipe(
        name="dpo",
        title="Direct preference optimization: the reference code",
        dialect="torch",
        settings={"lr": 5e-7, "alpha": 0.99, "eps": 1e-8},
        source="eric-mitchell/direct-preference-optimization 1ea1c06, config/config.yaml; 22ec5bc, README.md",
        fixes="it is torch.optim.RMSprop with its defaults",
        batch="64 in the README's runs; the configuration's default is 4",
        schedule="linear warm-up over 150 steps, then constant",
        clipping="global norm 10 (clip_global_norm=10)",
    ),
    Recipe(
        name="dpo-paper",
        title="Direct preference optimization, Rafailov et al., 2023: the paper",
        dialect="torch",
        settings={"lr": 1e-6, "alpha": 0.99, "eps": 1e-8},
        source="arXiv:2305.18290, appendix B",
        fixes="it is torch.optim.RMSprop with its defaults",
        batch="64",
        schedule="linear warm-up from 0 over 150 steps, then constant",
        clipping="not stated; the reference code clips the global norm to 10",
    ),
)
