"""Weights of the tasks' losses: fixed, uncertainty, GradNorm."""

import math

import pytest
import torch
from torch.testing import assert_close

from apps.recsys.tables.negatives.weighting import WeightingConfig

TASKS = ("click", "buy")


def losses(*values):
    return torch.tensor(values, requires_grad=True)


def test_fixed_weights_are_a_sum():
    # 1 * 2 + 0.5 * 4.
    loss, learnt = WeightingConfig(weights={"buy": 0.5}).build(TASKS)(losses(2.0, 4.0))
    assert float(loss) == 4.0
    assert learnt == {}


def test_uncertainty_weighs_by_the_variance():
    # s = log 2 and 0: 2 / 2 + log(2) / 2 + 4 / 1 + 0.
    weighting = WeightingConfig("uncertainty").build(TASKS)
    with torch.no_grad():
        weighting.log_variance[0] = math.log(2)
    loss, learnt = weighting(losses(2.0, 4.0))
    assert float(loss) == pytest.approx(5 + math.log(2) / 2)
    assert learnt["weight"].tolist() == pytest.approx([0.5, 1.0])
    loss.backward()
    # d/ds (e^-s L + s / 2) = -e^-s L + 1/2: at rest where the variance is twice the loss.
    assert weighting.log_variance.grad.tolist() == pytest.approx([-0.5, -3.5])
    assert float(weighting.eval()(losses(2.0, 4.0))[0]) == 6.0  # the models stay comparable


def test_uncertainty_starts_at_the_given_weights():
    _, learnt = WeightingConfig("uncertainty", {"buy": 0.25}).build(TASKS)(losses(1.0, 1.0))
    assert learnt["weight"].tolist() == pytest.approx([1.0, 0.25])


def test_gradnorm_pulls_the_gradients_to_one_norm():
    # W = (1, 2). L1 = 3 w1, L2 = w2 + 4: gradients (3, 0) and (0, 1), norms 3 and 1; weights 1 and 1.
    # alpha 0: target (3 + 1) / 2 = 2; balance |3 - 2| + |1 - 2| = 2. w = 2 softmax(u): dw1/du1 = 2 * 1/4 = 1/2,
    # dw2/du1 = -1/2. d balance/du1 = 3 * 1/2 * (+1) + 1 * (-1/2) * (-1) = 2: descent lowers the first weight.
    weighting = WeightingConfig("gradnorm", alpha=0.0).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, learnt = weighting(torch.stack((3 * w[0], w[1] + 4)), shared=(w, 2))
    assert float(loss) == pytest.approx(3 + 6)  # the balance adds nothing to the value
    assert learnt["gradient_norm"].tolist() == pytest.approx([3.0, 1.0])
    loss.backward()
    assert weighting.logits.grad.tolist() == pytest.approx([2.0, -2.0])
    assert w.grad.tolist() == [3.0, 1.0]  # the weighted losses alone move the rest


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_a_batch_without_labels_teaches_the_weights_nothing(kind):
    weighting = WeightingConfig(kind).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, _ = weighting(0 * w, torch.tensor([False, False]), (w, 2))
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad.tolist() == [0, 0] for p in weighting.parameters())


def test_gradnorm_leaves_a_task_without_labels_out_of_the_means():
    # The task alone is at the mean rate, and its norm is the mean norm: nothing pulls at the weights.
    weighting = WeightingConfig("gradnorm", alpha=1.0).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weighting(torch.stack((3 * w[0], 0 * w[1])), torch.tensor([True, False]), (w, 2))[0].backward()
    assert weighting.logits.grad.tolist() == [0, 0]


def test_gradnorm_helps_the_slower_task():
    # Constant predictions lose log 2 each. L = log 2 (still there) and log(2) / 3: rates 1.5 and 0.5, norms 1 and 1.
    # alpha 1: targets 1.5 and 0.5: the first weight rises, the second falls.
    weighting = WeightingConfig("gradnorm", alpha=1.0).build(TASKS, (math.log(2), math.log(2)))
    w = torch.tensor([math.log(2), math.log(2) / 3], requires_grad=True)
    loss, _ = weighting(w * 1.0, shared=(w, 2))
    loss.backward()
    assert weighting.logits.grad[0] < 0 < weighting.logits.grad[1]


def test_gradnorm_weights_are_positive_and_sum_to_the_number_of_tasks():
    weighting = WeightingConfig("gradnorm").build(("a", "b", "c"))
    with torch.no_grad():
        weighting.logits.copy_(torch.tensor([5.0, 0.0, -5.0]))
    w = torch.ones(3, requires_grad=True)
    _, learnt = weighting(w * 1.0, shared=(w, 3))
    assert (learnt["weight"] > 0).all()
    assert_close(learnt["weight"].sum(), torch.tensor(3.0))


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_learned_weights_do_not_enter_an_evaluation(kind):
    weighting = WeightingConfig(kind, weights={"click": 2.0}).build(TASKS).eval()
    with torch.no_grad():
        next(iter(weighting.parameters())).fill_(1.0)
    loss, learnt = weighting(losses(1.0, 1.0))
    assert float(loss) == 3.0
    assert learnt == {}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightingConfig("gradnorm", {"buy": 0.0}), r"weights\['buy'\]=0.0 is not above 0"),
        (lambda: WeightingConfig(weights={"like": 1.0}).build(TASKS), "names 'like', which is no task; there is click"),
        (lambda: WeightingConfig(weights={"click": 0.0, "buy": 0.0}).build(TASKS), "leaves no task"),
    ],
)
def test_a_weighting_without_a_meaning_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
