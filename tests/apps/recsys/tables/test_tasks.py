"""Task heads: towers, ESMM over the whole space, AITM's transfer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from apps.recsys.tables.tasks import HeadConfig, and_logit, over_all, step_labels

NAN = math.nan


def logit(p):
    return math.log(p / (1 - p))


# ---- towers


@pytest.mark.parametrize("hidden_dims", [(4, 2), ()])
def test_towers_are_mlps_side_by_side(hidden_dims):
    torch.manual_seed(0)
    head = HeadConfig(hidden_dims=hidden_dims, activation="silu").build(5, 3)
    x_tBD = torch.randn(3, 7, 5)
    for t in range(3):
        h = x_tBD[t]
        for i in range(len(hidden_dims)):
            h = F.silu(h @ getattr(head.towers, f"w_{i}")[t] + getattr(head.towers, f"b_{i}")[t])
        assert_close(head(x_tBD)[:, t], (h @ head.weight[t] + head.bias[t]).squeeze(-1))


def test_a_batch_of_one_trains_under_batch_norm():
    head = HeadConfig(norm="batch").build(4, 2)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    x_tBD = torch.randn(2, 1, 4)
    y = head(x_tBD)
    y.sum().backward()
    assert_close(y, head.eval()(x_tBD))  # the running statistics, which stay
    assert_close(head.state_dict(), before)


def test_dropout_is_of_training_alone():
    head = HeadConfig(hidden_dims=(32,), dropout=0.5).build(4, 2)
    x_tBD = torch.randn(2, 8, 4)
    assert not torch.equal(head(x_tBD), head(x_tBD))
    assert torch.equal(head.eval()(x_tBD), head(x_tBD))


@pytest.mark.parametrize("kind", ["plain", "esmm", "aitm"])
def test_logits_start_at_the_share_of_positives(kind):
    # With towers at zero: 0.5 and 0.2. Of ESMM the second tower starts at 0.2 / 0.5, and the product is 0.2 again.
    head = HeadConfig(kind).build(4, 2, positives=(0.5, 0.2))
    with torch.no_grad():
        head.weight.zero_()
    assert_close(head(torch.randn(2, 3, 4)).sigmoid(), torch.tensor([[0.5, 0.2]] * 3))
    assert HeadConfig(kind, prior_bias=False).build(4, 2, positives=(0.5, 0.2)).bias.abs().sum() > 0


# ---- ESMM


def test_the_conversion_over_the_whole_space_is_the_product():
    # 0.5 * 0.4 = 0.2, and 0.2 * 0.25 = 0.05 for a third step.
    head = HeadConfig("esmm", hidden_dims=()).build(1, 3)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
    x_tBD = torch.tensor([logit(0.5), logit(0.4), logit(0.25)]).view(3, 1, 1)
    assert_close(head(x_tBD).sigmoid(), torch.tensor([[0.5, 0.2, 0.05]]))


def test_a_product_of_extreme_probabilities_keeps_its_logit_and_gradient():
    # Float32 probabilities are 0 below exp(-104): -60 - 60 is the logit of a product all the same. 1 times 1 stays
    # below 1: of two chances 1 - e^-40, the complement is 2 e^-40.
    a = torch.tensor([-60.0, 40.0, 300.0, -300.0], requires_grad=True)
    b = torch.tensor([-60.0, 40.0, -2.0, 300.0])
    z = and_logit(a, b)
    assert_close(z.detach(), torch.tensor([-120.0, 40.0 - math.log(2), -2.0, -300.0]))
    F.binary_cross_entropy_with_logits(z, torch.ones(4)).backward()
    assert a.grad.isfinite().all()
    assert a.grad[0] != 0


def test_esmm_losses_are_those_of_probabilities():
    # The loss on ctcvr written out, in float64: -y log(p q) - (1 - y) log(1 - p q).
    a, b = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (torch.arange(9) % 2).double()
    pq = a.sigmoid() * b.sigmoid()
    expected = -(y * pq.log() + (1 - y) * (1 - pq).log())
    assert_close(F.binary_cross_entropy_with_logits(and_logit(a, b), y, reduction="none"), expected)


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_a_step_without_the_one_before_is_refused(kind):
    head = HeadConfig(kind).build(4, 2)
    head.check_labels(torch.tensor([[1.0, 1.0], [0.0, math.nan], [math.nan, 1.0]]), ("click", "buy"))
    with pytest.raises(ValueError, match="an example has 'buy' and not 'click'"):
        head.check_labels(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), ("click", "buy"))
    with pytest.raises(ValueError, match=f"head.kind='{kind}' needs at least 2 tasks, there is 1"):
        HeadConfig(kind).build(4, 1)


def test_a_step_without_a_label_is_0_where_an_earlier_one_is():
    # Not clicked, so neither carted nor bought, written or not; clicked, or not known: what is not labeled stays so.
    label_Bt = torch.tensor([[0.0, NAN, NAN], [0.0, 0.0, NAN], [1.0, NAN, NAN], [NAN, NAN, 1.0], [1.0, 0.0, NAN]])
    filled = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, NAN, NAN], [NAN, NAN, 1.0], [1.0, 0.0, 0.0]]
    assert_close(step_labels(label_Bt), torch.tensor(filled), equal_nan=True)
    for config in (HeadConfig("esmm"), HeadConfig("aitm"), HeadConfig(steps=True)):
        assert_close(config.build(4, 3).labels(label_Bt), torch.tensor(filled), equal_nan=True)
    assert HeadConfig().build(4, 3).labels(label_Bt) is label_Bt
    head = HeadConfig("esmm").build(4, 3)
    with pytest.raises(ValueError, match="an example has 'c' and not 'b'"):  # b is 0, since a is
        head.check_labels(head.labels(torch.tensor([[0.0, NAN, 1.0]])), ("a", "b", "c"))


def test_a_share_of_those_who_came_so_far_starts_as_one():
    # 20 % click and 50 % of these buy, the others have no label: 10 % buy.
    assert over_all([0.2, 0.5, 0.1]) == pytest.approx([0.2, 0.1, 0.1])
    for kind in ("esmm", "aitm"):
        head = HeadConfig(kind).build(4, 2, positives=(0.2, 0.5))
        with torch.no_grad():
            head.weight.zero_()
        assert_close(head(torch.randn(2, 3, 4)).sigmoid(), torch.tensor([[0.2, 0.1]] * 3))


# ---- AITM


def test_aitm_attends_to_what_is_passed_on_and_to_its_own():
    # D = 1. z1 = q1 = 2; passed on: relu(3 * 2 + 1) = 7; q2 = 5. v(u) = u, k(u) = u, s(u) = 0.1 u:
    # scores 0.1 * 49 and 0.1 * 25, so z2 = (7 e^4.9 + 5 e^2.5) / (e^4.9 + e^2.5) = 6.8336. Logits are z.
    head = HeadConfig("aitm", hidden_dims=()).build(1, 2)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
        head.transfer_weight.fill_(3.0)
        head.transfer_bias.fill_(1.0)
        head.attention_weight.copy_(torch.tensor([[[1.0, 1.0, 0.1]]]))
    z2 = (7 * math.exp(4.9) + 5 * math.exp(2.5)) / (math.exp(4.9) + math.exp(2.5))
    assert_close(head(torch.tensor([[[2.0]], [[5.0]]])), torch.tensor([[2.0, z2]]))


def test_the_calibrator_is_a_hinge_between_steps():
    # Probabilities (0.5, 0.7) and (0.5, 0.3): excess 0.2 and 0, mean 0.1, times 0.6.
    head = HeadConfig("aitm").build(4, 2)
    logits_Bt = torch.tensor([[0.0, logit(0.7)], [0.0, logit(0.3)]])
    assert float(head.losses(logits_Bt)["calibrator"]) == pytest.approx(0.06)
    assert HeadConfig("aitm", calibrator_weight=0.0).build(4, 2).losses(logits_Bt) == {}
    assert HeadConfig().build(4, 2).losses(logits_Bt) == {}
