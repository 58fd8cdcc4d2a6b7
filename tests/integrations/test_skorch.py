"""skorch builds RMSprop from prefixed arguments, steps it with a closure, and changes it during training."""

import pickle

import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop
from rmsprop.spec import Hyper, Rule

pytestmark = needs("skorch", "sklearn")


def expected(_step: int, group: int) -> Case:
    """Return the expected settings: weight decay on all but the biases."""
    hyper = Hyper(1e-3, alpha=0.9, eps=1e-6, momentum=0.5, weight_decay=(0.0, 1e-4)[group])
    return Case(Rule(momentum=True), hyper)


def test_every_prefixed_setting_arrives() -> None:
    """15 steps with a closure equal the reference's under optimizer__... and its optimizer__param_groups."""
    with judging(expected) as judge:
        net, accuracy = example("skorch_digits").train(epochs=2)
    assert judge.steps == 30  # 1797 images in batches of 128
    assert accuracy > 0.6
    assert type(net.optimizer_) is RMSprop
    assert "[1] g ← g + 0.0001·p" in net.optimizer_.explain()


def test_what_is_changed_later_is_obeyed_and_pickles() -> None:
    """set_params writes into the groups, the next epoch uses them, and a pickled estimator keeps its state."""
    net, _ = example("skorch_digits").train(epochs=1)
    net.set_params(lr=5e-4, optimizer__alpha=0.8)

    def later(_step: int, group: int) -> Case:
        case = expected(1, group)
        return Case(case.rule, Hyper(5e-4, 0.8, 1e-6, 0.5, case.hyper.weight_decay))

    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    with judging(later) as judge:
        net.partial_fit((x / 16).astype("float32"), y)
    assert judge.steps == 15
    again = pickle.loads(pickle.dumps(net)).optimizer_
    assert again.explain() == net.optimizer_.explain()
    for ours, theirs in zip(net.optimizer_.state.values(), again.state.values(), strict=True):
        assert torch.equal(ours["square_avg"], theirs["square_avg"])
