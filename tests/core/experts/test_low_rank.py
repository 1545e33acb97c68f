"""Low-rank experts and scaling vectors, by numbers that one can check by hand, and against the update written out."""

from __future__ import annotations

import pytest
import torch
from hand_rows import rows, summed
from torch import Tensor, nn

from core import IA3, Dense, LoRA, Merge, MoEConfig, Random, Rows, TokenChoice
from core.kernels import BACKENDS
from core.memory import kept_bytes


def set_to(**values: tuple[Tensor, list]) -> None:
    with torch.no_grad():
        for parameter, value in values.values():
            parameter.copy_(torch.tensor(value))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_low_rank_update_by_hand(backend, gathered):
    experts = LoRA(1, alpha=2.0).build(2, 2, 3)
    experts.backend = backend
    set_to(w_a=(experts.w_a, [[[1.0], [1.0]], [[1.0], [0.0]]]), w_b=(experts.w_b, [[[1.0, 0, 2]], [[0, 4.0, 0]]]))
    # alpha / rank = 2. Expert 0: token 0 is 1 + 2 = 3, so 2 * 3 * (1, 0, 2), at gate 0.5; token 1 is 3 + 4 = 7.
    # Expert 1: token 0 is 1, so 2 * (0, 4, 0), at gate 0.25.
    assert summed(experts, gathered).tolist() == [[3.0, 2.0, 6.0], [14.0, 0.0, 28.0]]


@pytest.mark.parametrize("gathered", [False, True])
def test_scaling_vectors_by_hand(gathered):
    experts = IA3().build(2, 2)
    # Where they start, a token is scaled by its gates: 0.5 + 0.25, and 1.
    assert summed(experts, gathered).tolist() == [[0.75, 1.5], [3.0, 4.0]]
    set_to(v=(experts.v, [[2.0, 0.0], [4.0, 8.0]]))
    # Token 0: (1, 2) times 0.5 (2, 0) + 0.25 (4, 8) = (2, 2). Token 1: (3, 4) times (2, 0).
    assert summed(experts, gathered).tolist() == [[2.0, 4.0], [6.0, 0.0]]


def test_an_update_starts_at_zero_and_learns():
    layer = MoEConfig(4, TokenChoice(2), LoRA(2)).build(6, 5)
    y = layer(torch.randn(2, 8, 6))
    assert y.shape == (2, 8, 5)
    assert not y.any()
    (y - 1).square().sum().backward()
    assert layer.experts.w_b.grad.any()
    layer.experts.init_each(nn.init.xavier_uniform_)
    assert layer.experts.w_a.any()
    assert not layer.experts.w_b.any()


def test_what_is_kept_for_the_backward_grows_with_the_rank_and_not_with_the_widths():
    T, E, rank = 256, 8, 4
    layer = MoEConfig(E, TokenChoice(2), LoRA(rank)).build(96, 384)
    kept = kept_bytes(layer, torch.randn(1, T, 96, requires_grad=True))
    # The rows' hidden numbers, a tile more; the rest is the router's: a few numbers for each token and expert.
    assert kept <= 4 * (2 * T + 31) * rank + 8 * 6 * T * E
    assert kept < 4 * T * 96  # a copy of the tokens


def test_dropout_is_the_same_for_all_experts_of_a_token():
    experts = LoRA(2, dropout=0.5).build(2, 2)
    with torch.no_grad():
        experts.w_a.copy_(torch.eye(2))
        experts.w_b.copy_(torch.eye(2))
    # Token 0 has the gates 0.5 + 0.25: each of its numbers is dropped in both rows, or doubled in both.
    drawn = {tuple(summed(experts, False)[0].tolist()) for _ in range(50)}
    assert drawn == {(0.0, 0.0), (1.5, 0.0), (0.0, 3.0), (1.5, 3.0)}
    assert summed(experts.eval(), False)[0].tolist() == [0.75, 1.5]


def test_vectors_merged_by_token_are_all_their_outputs_and_by_sequence_are_those_of_a_merged_layer():
    x = torch.randn(2, 5, 6)
    by_token = MoEConfig(3, Dense(), IA3()).build(6)
    nn.init.normal_(by_token.experts.v)
    weights_TE = by_token.router.gate(x.flatten(0, 1)).softmax(-1)
    expected = x * (weights_TE @ by_token.experts.v).view_as(x)
    torch.testing.assert_close(by_token(x), expected)
    by_sequence = MoEConfig(3, Merge(), IA3()).build(6)
    nn.init.normal_(by_sequence.experts.v)
    weights_BE = by_sequence.router.gate(x.mean(1)).softmax(-1)
    torch.testing.assert_close(by_sequence(x), x * (weights_BE @ by_sequence.experts.v)[:, None])


def test_in_evaluation_random_vectors_are_their_average():
    x, layer = torch.randn(2, 5, 6), MoEConfig(3, Random(per="batch", evaluation="average"), IA3()).build(6)
    nn.init.normal_(layer.experts.v)
    one_of_them = layer(x)
    assert any(torch.allclose(one_of_them, x * v_D) for v_D in layer.experts.v)
    torch.testing.assert_close(layer.eval()(x), x * layer.experts.v.mean(0))


def test_a_gate_of_zero_has_a_gradient():
    given = rows(False)
    gates_R = torch.zeros(4, requires_grad=True)
    experts = IA3().build(2, 2)
    experts(Rows(given.x, given.row_index_R, given.offsets_E, gates_R, 2)).x.sum().backward()
    # The sums of the tokens that the rows hold; the last place is empty.
    assert gates_R.grad.tolist() == [3.0, 7.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(9).build(2, 8, 20), "rank=9 exceeds the smaller of dim=8 and out_dim=20"),
        (lambda: LoRA(9).build(2, 20, 8), "rank=9 exceeds the smaller of dim=20 and out_dim=8"),
        (lambda: MoEConfig(2, TokenChoice(1), LoRA(9)).build(8), "rank=9 exceeds the smaller of dim=8 and out_dim=8"),
        (lambda: IA3().build(2, 8, 9), "out_dim=9 is not dim=8"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
