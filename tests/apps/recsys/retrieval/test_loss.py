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
    items, log_q = torch.tensor([7, 8]), torch.tensor([0.5, 0.25]).log()
    assert float(sampled_softmax(logits, items, log_q)) == pytest.approx(-(math.log(1 / 4) + math.log(8 / 9)) / 2)
    # without a correction they are 2 / 5 and 4 / 5
    assert float(sampled_softmax(logits, items, None)) == pytest.approx(-(math.log(2 / 5) + math.log(4 / 5)) / 2)


def test_an_item_is_no_negative_of_itself():
    # Rows 0 and 2 have the item 5, and so has a drawn column. Row 0 is compared with columns 0 and 1: 1 / (1 + 2);
    # row 1 with columns 0 to 3: 3 / (1 + 3 + 2 + 4), since the others' item may be there several times;
    # row 2 with columns 1 and 2: 6 / (5 + 6).
    logits = torch.tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 3.0, 2.0, 4.0], [9.0, 5.0, 6.0, 9.0]]).log().requires_grad_()
    loss = sampled_softmax(logits, torch.tensor([5, 6, 5, 5]), None)
    assert float(loss.detach()) == pytest.approx(-(math.log(1 / 3) + math.log(3 / 10) + math.log(6 / 11)) / 3)
    loss.backward()
    masked = [(0, 2), (0, 3), (2, 0), (2, 3)]
    assert [(r, c) for r, c in (logits.grad == 0).nonzero().tolist()] == masked


def test_with_the_whole_catalogue_drawn_alike_it_is_the_full_softmax():
    torch.manual_seed(0)
    user, item = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    own = torch.tensor([8, 2, 5])
    columns = torch.cat((own, torch.tensor([i for i in range(9) if i not in own.tolist()])))
    log_q = torch.full((9,), -math.log(9), dtype=torch.float64)
    loss = sampled_softmax(user @ item[columns].t(), columns, log_q)
    assert_close(loss, F.cross_entropy(user @ item.t(), own), rtol=1e-12, atol=0)


def test_probabilities_of_a_place_by_hand():
    # Of 8 pairs 5 have the first item and 2 the second; the third has none, and counts as 1.
    count = torch.tensor([5, 2, 0])
    assert_close(log_probability(count).exp(), torch.tensor([5 / 8, 2 / 8, 1 / 8]))
    # 6 places of pairs and 2 of uniform draws: (6 * 5/8 + 2/3) / 8, and so on.
    mixed = torch.tensor([(6 * n / 8 + 2 / 3) / 8 for n in (5, 2, 1)])
    assert_close(log_probability(count, 6, 2).exp(), mixed)
    assert float(mixed.sum()) == pytest.approx(1)


def test_shapes_that_do_not_fit_are_refused():
    for logits, items, log_q in (((3, 2), 2, None), ((2, 3), 2, None), ((2, 3), 3, 2)):
        with pytest.raises(ValueError, match=r"they must be \(B, C\), \(C,\) and \(C,\), C at least B"):
            sampled_softmax(torch.zeros(logits), torch.arange(items), None if log_q is None else torch.zeros(log_q))
