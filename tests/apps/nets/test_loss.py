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


def test_by_hand():
    # Logits h * (log 1, log 2, log 3). h = 1: shares 1/6, 2/6, 3/6; h = 2: 1/14, 4/14, 9/14.
    weight = torch.tensor([[1.0], [2.0], [3.0]]).log()
    cost = linear_cross_entropy(torch.tensor([[1.0], [2.0]]), weight, torch.tensor([1, 2]))
    assert float(cost) == pytest.approx((math.log(3) + math.log(14 / 9)) / 2, rel=1e-6)


def test_smoothing_by_hand():
    # Shares 1/6, 2/6, 3/6. With 0.3 spread evenly the target's weight is 0.8, the others' 0.1.
    weight = torch.tensor([[1.0], [2.0], [3.0]]).log()
    cost = linear_cross_entropy(torch.tensor([[1.0]]), weight, torch.tensor([1]), label_smoothing=0.3)
    assert float(cost) == pytest.approx(0.1 * math.log(6) + 0.8 * math.log(3) + 0.1 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("elements", [1, 50, 2**21], ids=["row_by_row", "chunks_of_4", "at_once"])
def test_value_and_gradients_are_those_of_the_plain_loss(elements, smoothing, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    h, weight, target = inputs()
    cost = linear_cross_entropy(h, weight, target, smoothing)
    plain = F.cross_entropy(h @ weight.t(), target, label_smoothing=smoothing)
    assert_close(cost, plain, rtol=0, atol=1e-12)
    # Times 3, as under the scaling of a loss.
    for ours, theirs in zip(
        torch.autograd.grad(3 * cost, (h, weight)), torch.autograd.grad(3 * plain, (h, weight)), strict=True
    ):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 50, 2**21], ids=["row_by_row", "chunks_of_4", "at_once"])
def test_left_out_columns_are_no_candidates(elements, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    h, weight, target = inputs()
    left_out = torch.randint(-1, 11, (37, 4), generator=torch.Generator().manual_seed(1))
    left_out[:3] = torch.tensor([[-1] * 4, [int(target[1])] * 4, [0, 0, 5, -1]])  # none; the target alone; one twice
    hidden = torch.zeros(37, 11, dtype=torch.bool)
    for row, columns in enumerate(left_out.tolist()):
        hidden[row, [column for column in columns if column >= 0 and column != int(target[row])]] = True
    cost = linear_cross_entropy(h, weight, target, left_out=left_out)
    plain = F.cross_entropy((h @ weight.t()).masked_fill(hidden, -math.inf), target)
    assert_close(cost, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(cost, (h, weight)), torch.autograd.grad(plain, (h, weight)), strict=True
    ):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_chunks_have_two_million_logits_and_64_rows_at_least():
    # 2^21 / 8,000 = 262.1; of 152,000 words, 2^21 logits would be 13 rows.
    assert [chunk_rows(4096, words) for words in (8_000, 152_000)] == [262, 64]
    assert [chunk_rows(rows, 152_000) for rows in (0, 10)] == [1, 10]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_do_not_count_may_hold_anything_and_get_no_gradient(smoothing):
    h, weight, target = inputs()
    real = torch.arange(37) % 3 > 0
    with torch.no_grad():
        h[0] = torch.nan
    cost = linear_cross_entropy(h, weight, target, smoothing, real=real)
    plain = F.cross_entropy(h[real] @ weight.t(), target[real], label_smoothing=smoothing)
    assert_close(cost, plain, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, (h, weight)) for value in (cost, plain))
    assert not ours[0][~real].any()
    for own, other in zip(ours, theirs, strict=True):
        assert_close(own, other, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    h, weight, target = inputs(T=5, D=3, V=4)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, target, 0.2), (h, weight))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_gradient_alone(smoothing):
    h, weight, target = inputs()
    plain = F.cross_entropy(h @ weight.t(), target, label_smoothing=smoothing)
    for wanted, given in ((weight, (h.detach(), weight)), (h, (h, weight.detach()))):
        (of_plain,) = torch.autograd.grad(plain, wanted, retain_graph=True)
        (ours,) = torch.autograd.grad(linear_cross_entropy(*given, target, smoothing), wanted)
        assert_close(ours, of_plain, rtol=0, atol=1e-12)


def test_a_hopeless_target_costs_its_distance_and_not_infinity():
    # exp(-200) is 0 in float32: log p would be -inf.
    cost = linear_cross_entropy(torch.tensor([[1.0]]), torch.tensor([[0.0], [200.0]]), torch.tensor([0]))
    assert float(cost) == 200.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_rows_cost_nothing(smoothing):
    h = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(3, 4, requires_grad=True)
    cost = linear_cross_entropy(h, weight, torch.zeros(0, dtype=torch.int64), smoothing)
    cost.backward()
    assert float(cost.detach()) == 0.0
    assert not weight.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_autocast_the_gradient_is_that_of_bfloat16_products(smoothing):
    h, weight, target = inputs(dtype=torch.float32)
    plain = F.cross_entropy(h @ weight.t(), target, label_smoothing=smoothing)
    with torch.autocast("cpu", torch.bfloat16):
        cost = linear_cross_entropy(h, weight, target, smoothing)
    assert cost.dtype == torch.float32
    # bfloat16 rounds by up to 2^-9 of a number: logits of up to 12 here, a p of up to 1.
    assert_close(cost, plain, rtol=0, atol=12 * 2**-9)
    gradients = (torch.autograd.grad(value, (h, weight)) for value in (cost, plain))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("elements", [1, 50, 2**21], ids=["row_by_row", "chunks_of_4", "at_once"])
def test_scores_of_each_target(elements, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    h, weight, target = inputs()
    logits = (h @ weight.t()).detach()
    with torch.autocast("cpu", torch.bfloat16):  # has no say
        scores = target_scores(h, weight, target)
    assert_close(scores.nll_T, F.cross_entropy(logits, target, reduction="none"), rtol=0, atol=1e-12)
    assert torch.equal(scores.is_first_T, logits.argmax(-1) == target)
    assert 0 < int(scores.is_first_T.sum()) < len(target)


# ---- a teacher's logits


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


def test_a_divergence_by_hand():
    # h = 1: the student's shares 1/6, 2/6, 3/6, the teacher's 1/3 each.
    weight = torch.tensor([[1.0], [2.0], [3.0]]).log()
    given = OutputLogits(torch.ones(1, 2), torch.zeros(3, 2))
    cost = OutputLogits(torch.ones(1, 1), weight).divergence(given, 1.0)
    assert float(cost) == pytest.approx((math.log(2) + math.log(1) + math.log(2 / 3)) / 3, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("elements", [1, 50, 2**21], ids=["row_by_row", "chunks_of_4", "at_once"])
def test_a_divergence_and_its_gradients_are_those_of_the_plain_one(elements, temperature, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    (h, weight, _), given = inputs(), teacher()
    cost, plain = (
        OutputLogits(h, weight).divergence(given, temperature),
        plain_divergence(h, weight, given, temperature),
    )
    assert_close(cost, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * cost, (h, weight)), torch.autograd.grad(3 * plain, (h, weight)), strict=True
    ):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_divergence_without_rows_is_nothing_and_moves_nothing():
    h, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    cost = OutputLogits(h, weight).divergence(OutputLogits(torch.zeros(0, 2), torch.ones(3, 2)), 1.0)
    cost.backward()
    assert float(cost.detach()) == 0.0
    assert not weight.grad.any()


def test_a_divergence_under_autocast_is_near_the_exact_one():
    (h, weight, _), given = inputs(dtype=torch.float32), teacher()
    given = OutputLogits(given.h_TD.float(), given.weight_VD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = OutputLogits(h, weight).divergence(given, 1.0)
    cost.backward()
    assert {cost.dtype, h.grad.dtype, weight.grad.dtype} == {torch.float32}
    assert float(cost.detach()) == pytest.approx(float(plain_divergence(h, weight, given, 1.0).detach()), rel=0.02)


# ---- padded rows, where the host would wait for the number of real ones


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
        assert_close(a, b, rtol=0, atol=1e-12)
        for own, other in zip(*(torch.autograd.grad(x, (h, weight), retain_graph=True) for x in (a, b)), strict=True):
            assert_close(own, other, rtol=0, atol=1e-12)
