"""Cross-entropy over a vocabulary: its value, its gradient, its chunks, its smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from apps.nets import loss
from apps.nets.loss import OutputLogits, chunk_rows, linear_cross_entropy, target_scores


def inputs(T=37, D=8, V=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(T, D, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    return h, weight, torch.randint(0, V, (T,), generator=g)


@pytest.fixture(params=[1, 50, 2**21], ids=["row_by_row", "chunks_of_4", "at_once"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)


def same(cost, plain, *weights):
    """Equal values and gradients, of 3 times each, as under the scaling of a loss."""
    assert_close(cost, plain, rtol=0, atol=1e-12)
    both = (torch.autograd.grad(3 * value, weights, retain_graph=True) for value in (cost, plain))
    for ours, theirs in zip(*both, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_losses_and_chunks_by_hand():
    # Logits h * (log 1, log 2, log 3). h = 1: shares 1/6, 2/6, 3/6; h = 2: 1/14, 4/14, 9/14.
    weight = torch.tensor([[1.0], [2.0], [3.0]]).log()
    cost = linear_cross_entropy(torch.tensor([[1.0], [2.0]]), weight, torch.tensor([1, 2]))
    assert float(cost) == pytest.approx((math.log(3) + math.log(14 / 9)) / 2, rel=1e-6)
    # With 0.3 spread evenly the target's weight is 0.8, the others' 0.1.
    cost = linear_cross_entropy(torch.tensor([[1.0]]), weight, torch.tensor([1]), label_smoothing=0.3)
    assert float(cost) == pytest.approx(0.1 * math.log(6) + 0.8 * math.log(3) + 0.1 * math.log(2), rel=1e-6)
    # A teacher's shares of 1/3 each.
    cost = OutputLogits(torch.ones(1, 1), weight).divergence(OutputLogits(torch.ones(1, 2), torch.zeros(3, 2)), 1.0)
    assert float(cost) == pytest.approx((math.log(2) + math.log(1) + math.log(2 / 3)) / 3, rel=1e-6)
    # exp(-200) is 0 in float32: log p would be -inf.
    cost = linear_cross_entropy(torch.tensor([[1.0]]), torch.tensor([[0.0], [200.0]]), torch.tensor([0]))
    assert float(cost) == 200.0
    # 2^21 / 8,000 = 262.1; of 152,000 words, 2^21 logits would be 13 rows.
    assert [chunk_rows(4096, words) for words in (8_000, 152_000)] == [262, 64]
    assert [chunk_rows(rows, 152_000) for rows in (0, 10)] == [1, 10]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_are_those_of_the_plain_loss(chunks, smoothing):
    h, weight, target = inputs()
    plain = F.cross_entropy(h @ weight.t(), target, label_smoothing=smoothing)
    same(linear_cross_entropy(h, weight, target, smoothing), plain, h, weight)
    # One gradient alone.
    same(linear_cross_entropy(h.detach(), weight, target, smoothing), plain, weight)
    same(linear_cross_entropy(h, weight.detach(), target, smoothing), plain, h)


def test_left_out_columns_are_no_candidates(chunks):
    h, weight, target = inputs()
    left_out = torch.randint(-1, 11, (37, 4), generator=torch.Generator().manual_seed(1))
    left_out[:3] = torch.tensor([[-1] * 4, [int(target[1])] * 4, [0, 0, 5, -1]])  # none; the target alone; one twice
    hidden = torch.zeros(37, 11, dtype=torch.bool)
    for row, columns in enumerate(left_out.tolist()):
        hidden[row, [column for column in columns if column >= 0 and column != int(target[row])]] = True
    plain = F.cross_entropy((h @ weight.t()).masked_fill(hidden, -math.inf), target)
    same(linear_cross_entropy(h, weight, target, left_out=left_out), plain, h, weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_do_not_count_may_hold_anything_and_get_no_gradient(smoothing):
    h, weight, target = inputs()
    real = torch.arange(37) % 3 > 0
    with torch.no_grad():
        h[0] = torch.nan
    cost = linear_cross_entropy(h, weight, target, smoothing, real=real)
    same(cost, F.cross_entropy(h[real] @ weight.t(), target[real], label_smoothing=smoothing), h, weight)
    assert not torch.autograd.grad(cost, h)[0][~real].any()


def kinds_of_cost(h, weight, target, given):
    yield from (linear_cross_entropy(h, weight, target, smoothing) for smoothing in (0.0, 0.1))
    yield OutputLogits(h, weight).divergence(given, 1.0)


def test_no_rows_cost_nothing_and_move_nothing():
    h, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    given = OutputLogits(torch.zeros(0, 2), torch.ones(3, 2))
    for cost in kinds_of_cost(h, weight, torch.zeros(0, dtype=torch.int64), given):
        cost.backward()
        assert float(cost.detach()) == 0.0
        assert not weight.grad.any()


def test_under_autocast_gradients_are_those_of_bfloat16_products():
    (h, weight, target), given = inputs(dtype=torch.float32), teacher()
    given = OutputLogits(given.h_TD.float(), given.weight_VD.float())
    plains = [F.cross_entropy(h @ weight.t(), target, label_smoothing=smoothing) for smoothing in (0.0, 0.1)]
    with torch.autocast("cpu", torch.bfloat16):
        costs = [*kinds_of_cost(h, weight, target, given)]
    for cost, plain in zip(costs, [*plains, plain_divergence(h, weight, given, 1.0)], strict=True):
        # bfloat16 rounds by up to 2^-9 of a number: logits of up to 12 here, a p of up to 1.
        assert_close(cost, plain, rtol=0, atol=12 * 2**-9)
        assert cost.dtype == torch.float32
        for ours, theirs in zip(*(torch.autograd.grad(value, (h, weight)) for value in (cost, plain)), strict=True):
            assert ours.dtype == torch.float32
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_scores_of_each_target(chunks):
    h, weight, target = inputs()
    logits = (h @ weight.t()).detach()
    with torch.autocast("cpu", torch.bfloat16):  # has no say
        scores = target_scores(h, weight, target)
    assert_close(scores.nll_T, F.cross_entropy(logits, target, reduction="none"), rtol=0, atol=1e-12)
    assert torch.equal(scores.is_first_T, logits.argmax(-1) == target)
    assert 0 < int(scores.is_first_T.sum()) < len(target)


def teacher(T=37, D=5, V=11):
    g = torch.Generator().manual_seed(1)
    return OutputLogits(*(torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, V)))


def plain_divergence(h, weight, given, temperature):
    """Return the mean over the rows of sum p log(p / q), row by row."""
    rows = []
    for own, own_teacher in zip(h @ weight.t(), given.h_TD @ given.weight_VD.t(), strict=True):
        p, log_q = (own_teacher / temperature).softmax(-1), (own / temperature).log_softmax(-1)
        rows.append((p * (p.log() - log_q)).sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_divergence_and_its_gradients_are_those_of_the_plain_one(chunks, temperature):
    (h, weight, _), given = inputs(), teacher()
    cost = OutputLogits(h, weight).divergence(given, temperature)
    same(cost, plain_divergence(h, weight, given, temperature), h, weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_that_stays_changes_neither_losses_nor_gradients(smoothing, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 50)  # chunks of 4 rows
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    g = torch.Generator().manual_seed(3)
    h = torch.randn(5, 6, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.float64, requires_grad=True)
    real_BL = torch.arange(6) < torch.tensor([6, 1, 0, 4, 3])[:, None]
    target_BL = torch.randint(1, 11, (5, 6), generator=g) * real_BL
    teacher_h = torch.randn(5, 6, 3, generator=g, dtype=torch.float64)
    teacher_weight = torch.randn(11, 3, generator=g, dtype=torch.float64)

    def costs(waits, target):
        monkeypatch.setattr(loss, "host_waits_for", lambda device: waits)
        own = OutputLogits.of_real(h, real_BL, weight)
        given = OutputLogits.of_real(teacher_h, real_BL, teacher_weight)
        label = linear_cross_entropy(own.h_TD, own.weight_VD, target, smoothing, real=own.real_T)
        return label, own.divergence(given, 2.0)

    packed, padded = costs(False, target_BL[real_BL]), costs(True, target_BL.flatten())
    for a, b in zip(packed, padded, strict=True):
        same(a, b, h, weight)
