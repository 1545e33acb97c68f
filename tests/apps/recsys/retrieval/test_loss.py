"""The softmax over a batch's items, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from apps.recsys.retrieval.loss import log_probability, sampled_softmax


def test_the_correction_by_hand():
    # exp of the logits is [[2, 3], [1, 4]], and the items are drawn with probabilities 1/2 and 1/4. Divided by them:
    # [[4, 12], [2, 16]]. The own items' shares are 4 / 16 and 16 / 18.
    logits = torch.tensor([[2.0, 3.0], [1.0, 4.0]]).log()
    own, once, log_q = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0.5, 0.25]).log()
    loss = sampled_softmax(logits, own, once, log_q)
    assert float(loss) == pytest.approx(-(math.log(1 / 4) + math.log(8 / 9)) / 2)
    # without a correction they are 2 / 5 and 4 / 5
    loss = sampled_softmax(logits, own, once, None)
    assert float(loss) == pytest.approx(-(math.log(2 / 5) + math.log(4 / 5)) / 2)


def test_an_item_is_no_negative_of_itself():
    # Three rows have the items 0, 1 and 0, and item 0 was drawn once more. Row 0 is compared with one item 1 alone:
    # 1 / (1 + 2); row 1 with three items 0: 3 / (3 + 3 * 1); row 2: 6 / (6 + 5).
    logits = torch.tensor([[1.0, 2.0], [1.0, 3.0], [6.0, 5.0]]).log()
    loss = sampled_softmax(logits, torch.tensor([0, 1, 0]), torch.tensor([3, 1]), None)
    assert float(loss) == pytest.approx(-(math.log(1 / 3) + math.log(3 / 6) + math.log(6 / 11)) / 3)


def slow(user_BD, item_CD, item_C, log_q_C):
    """Return the loss with a column for each place of the sample: that of row b is column b."""
    losses = []
    for b, user_D in enumerate(user_BD):
        kept = [c for c in range(len(item_C)) if c == b or item_C[c] != item_C[b]]
        logits = torch.stack([user_D @ item_CD[c] - log_q_C[c] for c in kept])
        losses.append(logits.logsumexp(0) - logits[kept.index(b)])
    return torch.stack(losses).mean()


def test_the_loss_and_its_gradients_are_those_of_a_column_for_each_place():
    torch.manual_seed(0)
    item_C = torch.tensor([2, 0, 2, 5, 0, 2, 1, 0, 5, 3])  # six pairs and four draws
    users = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    log_q = torch.rand(6, dtype=torch.float64).log()
    item_U, place_C, count_U = item_C.unique(return_inverse=True, return_counts=True)
    fast = sampled_softmax(users @ items[item_U].t(), place_C[:6], count_U, log_q[item_U])
    reference = slow(users, items[item_C], item_C.tolist(), log_q[item_C])
    assert_close(fast, reference, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (users, items)) for loss in (fast, reference)), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_with_the_whole_catalog_drawn_alike_it_is_the_full_softmax():
    torch.manual_seed(0)
    user, item = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    own = torch.tensor([8, 2, 5])
    log_q = torch.full((9,), -math.log(9), dtype=torch.float64)
    loss = sampled_softmax(user @ item.t(), own, torch.ones(9, dtype=torch.int64), log_q)
    assert_close(loss, F.cross_entropy(user @ item.t(), own), rtol=1e-12, atol=0)


def test_probabilities_of_a_place_by_hand():
    # Of 8 pairs 5 have the first item and 2 the second; the third has none, and counts as 1.
    count = torch.tensor([5, 2, 0])
    assert_close(log_probability(count).exp(), torch.tensor([5 / 8, 2 / 8, 1 / 8]))
    # 6 places of pairs and 2 of uniform draws: (6 * 5/8 + 2/3) / 8, and so on.
    mixed = torch.tensor([(6 * n / 8 + 2 / 3) / 8 for n in (5, 2, 1)])
    assert_close(log_probability(count, 6, 2).exp(), mixed)
    assert float(mixed.sum()) == pytest.approx(1)
