"""The counter, the config's formula and a count by hand agree."""

import pytest
import torch
import torch.nn.functional as F
from grids import pairwise
from torch._subclasses.fake_tensor import FakeTensorMode

from core import FFN, GEGLU, MoEConfig, RoutingContext, SwiGLU, TokenChoice, count_flops

BACKENDS = ["eager", "cpu", "grouped"]
D, E, T = 16, 4, 24


def hand_count(config: MoEConfig, tokens: int = T) -> int:
    """Two a multiply-add: D x E for the router, then D x 12 (twice if gated) and 12 x D for each expert of a token."""
    matrices = 3 if isinstance(config.expert, SwiGLU) else 2
    experts = config.router.top_k + config.num_shared_experts
    return tokens * (2 * D * E + experts * matrices * 2 * D * 12)


EXPERTS = [FFN(12), FFN(12, bias=True), SwiGLU(12), GEGLU(12)]


@pytest.mark.parametrize("backend, expert, top_k, shared", pairwise(BACKENDS, EXPERTS, [1, 2], [0, 1]), ids=str)
def test_counter_equals_formula_equals_hand_count(backend, expert, top_k, shared):
    config = MoEConfig(E, TokenChoice(top_k), expert, num_shared_experts=shared, backend=backend)
    counted = count_flops(config.build(D), torch.randn(2, T // 2, D))
    assert counted == config.flops_per_token(D) * T == hand_count(config)


def test_flops_of_one_layer_by_hand():
    # Router 2 * 16 * 4 = 128; one row 2 * (16 * 12 + 12 * 16) = 768; two experts a token: 1664.
    assert MoEConfig(E, expert=FFN(12)).flops_per_token(D) == 1664
    # Capacity for half of two experts a token: 128 + 1 * 768; a factor above 1 cannot add pairs.
    assert MoEConfig(E, expert=FFN(12), capacity_factor=0.5).flops_per_token(D) == 896
    assert MoEConfig(E, expert=FFN(12), capacity_factor=1.5).flops_per_token(D) == 1664
    for out_dim in (None, 5):
        config = MoEConfig(E, expert=FFN(12))
        assert count_flops(config.build(D, out_dim), torch.randn(1, T, D)) == T * config.flops_per_token(D, out_dim)


@pytest.mark.parametrize("backend, expert, shared", pairwise(BACKENDS, EXPERTS[1:3], [0, 1]), ids=str)
def test_forward_and_backward_cost_three_forwards(backend, expert, shared):
    # Each product of the forward has two of the same size in the backward: for its input and for its weight.
    config = MoEConfig(E, expert=expert, num_shared_experts=shared, backend=backend)
    layer, x = config.build(D), torch.randn(2, T // 2, D, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * hand_count(config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_pairs_cost_nothing_and_padding_the_router_alone(backend):
    # All 24 tokens choose expert 0, which takes ceil(0.5 * 24 / 4) = 3.
    layer = MoEConfig(E, TokenChoice(1), FFN(12), capacity_factor=0.5, backend=backend).build(D)
    layer.router.gate.weight.data.copy_(torch.tensor([1.0, -1, -1, -1])[:, None].expand(E, D))
    assert count_flops(layer, torch.randn(1, T, D).abs()) == T * 2 * D * E + 3 * 768
    layer, valid = MoEConfig(E, expert=FFN(12), backend=backend).build(D), torch.arange(T)[None] < 10
    counted = count_flops(layer, torch.randn(1, T, D), RoutingContext(valid_BS=valid))
    assert counted == T * 2 * D * E + 10 * 2 * 768
    if backend != "eager":  # every pair counts where offsets are fake
        config = MoEConfig(E, expert=FFN(12), capacity_factor=0.5, backend=backend)
        layer = config.build(D)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert count_flops(layer, mode.from_tensor(torch.randn(1, T, D))) == hand_count(config)


def test_attention_on_cpu_by_hand():
    # Per head: q k^T is 10 x 7 of 8 products, scores v 10 x 7 of 8: 2 * 2 * 10 * 7 * 8; six heads.
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 7, 7))
    forward = 6 * 4 * 10 * 7 * 8
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == forward
    # Backward: the scores once more, then dv, dscores, dq, dk: five products to the forward's two.
    both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both == forward + forward * 5 // 2
    # It equals its two products written out.
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    written_out = count_flops(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == written_out


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_multiplies_each_step_by_its_matrices(kind, gates):
    # 4 x 10 steps, each by matrices of 16 and 32 rows with ``gates`` times 32 columns.
    layer = getattr(torch.nn, kind)(16, 32, batch_first=True)
    assert count_flops(layer, torch.randn(4, 10, 16)) == 2 * 40 * gates * 32 * (16 + 32)
    with torch.no_grad():
        assert count_flops(layer.eval(), torch.randn(4, 10, 16)) == 2 * 40 * gates * 32 * (16 + 32)
    # A matrix by a vector is 5 * 7.
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert count_flops(torch.mv, matrix, vector) == count_flops(torch.addmv, torch.randn(5), matrix, vector) == 70


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_of_torch_is_counted_in_evaluation_too(training):
    # T = 6 tokens, D = 8, F = 16: four projections 8 T D^2, two products of attention 4 T T D, the network 4 T D F.
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).train(training)
    with torch.no_grad():
        assert count_flops(layer, torch.randn(1, 6, 8)) == 8 * 6 * 64 + 4 * 36 * 8 + 4 * 6 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()
