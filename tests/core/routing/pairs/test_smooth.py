"""Dense gates, DSelect-k, dense-to-sparse annealing and SparseMixer on typed logits and codes."""

import math

import pytest
import torch
from routed import built, gates, ids, logits_of
from torch._dynamo.testing import CompileCounterWithBackend

from core import FFN, MoEConfig, aux_losses, record, update_expert_bias
from core.routing.pairs.smooth import (
    Dense,
    DenseToSparse,
    DSelectK,
    reachability,
    selector_entropy,
    selectors,
    smooth_step,
)
from core.routing.pairs.sparse_mixer import SparseMixer


def coded(codes: list[list[float]], weights: list[float], num_experts: int, training: bool = False, **options):
    """A static DSelect-k of these codes, a row a selector, lowest bit first, and these selectors' weights."""
    config = DSelectK(top_k=len(codes), per_token=False, **options)
    router = config.build(3, num_experts).train(training)
    router.gate.code_weight.data.copy_(torch.tensor(codes).reshape(-1, 1))
    router.gate.weight.data.copy_(torch.tensor(weights).log()[:, None])
    return router


# Dense


def test_dense_gates_are_the_softmax_of_all_experts_and_the_output_their_mixture():
    x = logits_of((0.3, 0.5, 0.2))
    for training in (False, True):
        routing = built(Dense(), 3, training)(x)
        assert (ids(routing), gates(routing)) == ([[1, 0, 2]], [pytest.approx([0.5, 0.3, 0.2])])
    # In evaluation alone it may be sparse, with its gates as they were.
    router = built(Dense(eval_top_k=2), 3)
    assert (ids(router(x)), gates(router(x))) == ([[1, 0]], [pytest.approx([0.5, 0.3])])
    assert ids(router.train()(x)) == [[1, 0, 2]]
    layer, x = MoEConfig(3, Dense(), FFN(6)).build(4), torch.randn(2, 5, 4)
    weights = (x @ layer.router.gate.weight.T).softmax(-1)
    each = torch.stack([torch.nn.functional.gelu(x @ layer.experts.w_in[e]) @ layer.experts.w_out[e] for e in range(3)])
    torch.testing.assert_close(layer(x), torch.einsum("bse,ebsd->bsd", weights, each))


# DSelect-k


def test_the_smooth_step_and_a_product_of_bits_by_hand():
    # t = 1/4: 1/4 (3/2 - 1/8) + 1/2 = 0.84375. Gamma 2 is twice as wide.
    z = torch.tensor([-9.0, -0.5, -0.25, 0.0, 0.25, 0.5, 9.0])
    expected = [0.0, 0.0, 0.15625, 0.5, 0.84375, 1.0, 1.0]
    assert (smooth_step(z, 1.0).tolist(), smooth_step(2 * z, 2.0).tolist()) == (expected, expected)
    # It is flat at its ends, and has slope 3 / 2 over gamma in the middle.
    z = torch.tensor([-0.5, 0.0, 0.5, 2.0], requires_grad=True)
    smooth_step(z, 1.0).sum().backward()
    assert z.grad.tolist() == [0.0, 1.5, 0.0, 0.0]
    # S(1/4) = 0.84375 = s for bit 0, S(-1/4) = 0.15625 = 1 - s for bit 1.
    # Expert 0: (1-s) s = 0.131836, 1: s s = 0.711914, 2: (1-s) (1-s) = 0.024414, 3: s (1-s) = 0.131836.
    r = selectors(torch.tensor([0.25, -0.25]), 4, 1.0)
    assert r.tolist() == pytest.approx([0.131836, 0.711914, 0.024414, 0.131836], abs=1e-6)
    assert selectors(torch.tensor([0.25, -0.25]), 3, 1.0).sum().item() == pytest.approx(1 - 0.131836, abs=1e-6)
    assert selectors(torch.zeros(0), 1, 1.0).tolist() == [1.0]
    for expert in range(5):  # that a binary code spells
        bits = torch.tensor([1.0 if expert >> j & 1 else -1.0 for j in range(3)])
        assert selectors(bits, 5, 1.0).tolist() == [float(e == expert) for e in range(5)]


def test_weights_of_soft_codes_and_a_bound_that_keeps_their_sum():
    # Two selectors of weights 3/4 and 1/4: the one above, and expert 2 for certain.
    router = coded([[0.25, -0.25], [-1.0, 1.0]], [0.75, 0.25], 4)
    routing = router(torch.randn(1, 2, 3))
    q = [0.75 * 0.131836, 0.75 * 0.711914, 0.75 * 0.024414 + 0.25, 0.75 * 0.131836]  # 0.0989, 0.5339, 0.2683, 0.0989
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx(q, abs=1e-6)
    assert ([row[:2] for row in ids(routing)], routing.tokens_per_expert_E.tolist()) == ([[1, 2]] * 2, [2, 2, 2, 2])
    codes, weights = [[0.25, -0.25]], [1.0]
    # 0.711914 and 0.131836 of a sum of 1: 0.843750 and 0.156250 (s, and 1 - s).
    routing = coded(codes, weights, 4, max_k=2)(torch.randn(1, 1, 3))
    assert gates(routing) == [pytest.approx([0.84375, 0.15625], abs=1e-6)]
    # In evaluation alone.
    router = coded(codes, weights, 4, eval_max_k=1)
    assert gates(router(torch.randn(1, 1, 3))) == [pytest.approx([1.0])]
    assert len(ids(router.train()(torch.randn(1, 1, 3)))[0]) == 4


def test_once_the_codes_are_binary_k_experts_are_computed():
    for training in (False, True):
        routing = coded([[1.0, -1.0], [-1.0, 1.0]], [0.75, 0.25], 4, training)(torch.randn(1, 3, 3))
        assert (ids(routing), gates(routing)) == ([[1, 2, 4, 4]] * 3, [pytest.approx([0.75, 0.25, 0.0, 0.0])] * 3)
        assert routing.tokens_per_expert_E.tolist() == [0, 3, 3, 0]
    # Both on the same expert: one is computed, with their whole weight.
    assert ids(coded([[1.0, -1.0]] * 2, [0.75, 0.25], 4)(torch.randn(1, 1, 3))) == [[1, 4, 4, 4]]
    # Three experts in two bits: code 3 is none, and gives nothing.
    routing = coded([[1.0, 1.0], [1.0, -1.0]], [0.75, 0.25], 3)(torch.randn(1, 1, 3))
    assert (ids(routing), gates(routing)) == ([[1, 3, 3]], [pytest.approx([0.25, 0.0, 0.0])])
    assert ids(coded([[1.0, 1.0]], [1.0], 3, max_k=2)(torch.randn(1, 1, 3))) == [[3, 3]]


def test_entropy_and_reachability_by_hand():
    # Entropies log 2 and 0; sums 1 and 1/2.
    r = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [[0.5, 0.5, 0.0], [0.25, 0.25, 0.0]]])
    # The second: log 2 + 2 * 1/4 * log 4 = 2 log 2.
    assert selector_entropy(r).tolist() == pytest.approx([math.log(2), 2 * math.log(2)])
    assert reachability(r).tolist() == pytest.approx([2.0, 3.0])
    assert reachability(torch.zeros(1, 2, 3)).tolist() == pytest.approx([200.0])


def test_the_gates_own_losses_are_in_the_balance_losses_in_training():
    layer = MoEConfig(3, DSelectK(top_k=1, per_token=False, selector_entropy=0.5, reachability=0.25), FFN(6)).build(4)
    with torch.no_grad():
        layer.router.gate.code_weight.copy_(torch.tensor([[0.0], [-1.0]]))  # experts 0 and 1 alike
    with record(layer) as tape:
        layer(torch.randn(2, 3, 4))
    losses = aux_losses(tape)
    assert losses.terms["selector_entropy"].item() == pytest.approx(math.log(2))
    assert losses.terms["reachability"].item() == pytest.approx(1.0)
    assert losses.total.item() == pytest.approx(0.5 * math.log(2) + 0.25)
    # For a power of 2 every code is an expert.
    layer = MoEConfig(4, DSelectK(), FFN(6)).build(4)
    with record(layer) as tape:
        layer(torch.randn(2, 3, 4))
    assert aux_losses(tape).terms.keys() == {"selector_entropy"}
    assert not layer.eval().router(torch.randn(1, 3, 4)).evidence.extra


def test_reachability_drives_weight_back_to_experts_and_entropy_makes_the_codes_binary():
    # Three experts, z = 0.45 for both bits: S = 0.99275 and 1 - S^2 = 0.01445 is left for them.
    router = coded([[0.45, 0.45]], [1.0], 3, training=True)
    routing = router(torch.randn(1, 1, 3))
    assert routing.evidence.scores_TE.sum().item() == pytest.approx(0.01445, abs=1e-5)
    routing.evidence.extra["reachability"].sum().backward()
    # d(1 / r) / dz = S S' / r^2, with S' = 1.5 - 6 * 0.45^2 = 0.285: 0.99275 * 0.285 / 0.01445^2 = 1355.
    assert router.gate.code_weight.grad.flatten().tolist() == pytest.approx([1355.0, 1355.0], rel=2e-3)
    router = DSelectK(top_k=2, per_token=False).build(3, 8).train()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        router(torch.randn(1, 1, 3)).evidence.extra["selector_entropy"].sum().backward()
        optimizer.step()
    assert router(torch.randn(1, 5, 3)).tokens_per_expert_E.gt(0).sum() <= 2


def test_codes_that_depend_on_the_token_are_linear_in_it():
    router = DSelectK(top_k=1).build(2, 4).eval()
    router.gate.code_weight.data.copy_(torch.eye(2))
    # A token is its own code.
    x = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]])
    assert [row[0] for row in ids(router(x))] == [0, 1, 2, 3]
    # A new gate starts with every code in reach.
    router = DSelectK(top_k=4, gamma=2.0).build(256, 16)
    codes, _ = router.gate(torch.randn(500, 256))
    assert codes.abs().max() < 1.0  # gamma / 2, beyond which there is no gradient; the standard deviation is 0.2


# Dense to sparse


def test_the_temperature_falls_by_the_same_factor_until_it_stops_and_small_gates_are_left_out():
    router = built(DenseToSparse(tau_start=2.0, tau_end=0.5, anneal_steps=2, threshold=0.05), 2)
    x, temperatures, drawn = logits_of((0.9, 0.1)), [], []
    for _ in range(4):
        temperatures.append(router.temperature.item())
        drawn += gates(router(x))
        router.after_step()
    assert temperatures == pytest.approx([2.0, 1.0, 0.5, 0.5])
    # Square roots of 0.9 and 0.1 are as 3 : 1, squares as 0.81 : 0.01; 0.012 is not above 0.05.
    # What stays is not raised.
    assert drawn[:3] == [pytest.approx(pair) for pair in ([0.75, 0.25], [0.9, 0.1], [81 / 82, 0.0])]
    assert ids(router(x)) == [[0, 2]]


def test_the_best_expert_is_always_taken_and_a_bound_cuts_the_rest():
    x = logits_of((0.4, 0.35, 0.25))
    assert ids(built(DenseToSparse(tau_start=1.0, threshold=0.3), 3)(x)) == [[0, 1, 3]]
    assert ids(built(DenseToSparse(tau_start=1.0, max_k=2), 3)(x)) == [[0, 1]]
    # All gates at the threshold or below it.
    assert ids(built(DenseToSparse(threshold=0.0), 1)(torch.zeros(1, 1, 1))) == [[0]]
    router = DenseToSparse(threshold=0.49).build(2, 2).eval()
    router.gate.weight.data.zero_()
    assert ids(router(torch.zeros(1, 1, 2))) == [[0, 1]]


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_gumbel_noise_draws_the_best_expert_by_its_probability(tau):
    # Whatever the temperature: 0.7, 4 sigma of 20000 draws is 0.013.
    router = built(DenseToSparse(tau_start=tau, tau_end=0.3), 2, training=True)
    routing = router(logits_of((0.7, 0.3)).expand(1, 20_000, 2))
    first = routing.expert_ids_N[::2]
    assert (first == 0).double().mean().item() == pytest.approx(0.7, abs=0.013)
    # The losses see the clean logits.
    clean = (torch.tensor([0.7, 0.3]).log() / tau).softmax(0)
    torch.testing.assert_close(routing.evidence.scores_TE[0], clean)


def test_one_call_per_optimizer_step_counts_it_in_training_and_is_saved():
    layer = MoEConfig(4, DenseToSparse(anneal_steps=10), FFN(6)).build(4)
    both = torch.nn.ModuleList([layer, MoEConfig(4, Dense(), FFN(6)).build(4)])
    both[1].router = layer.router  # shared: still one step
    with record(both) as tape:
        both[1](layer(torch.randn(1, 3, 4)))
    for _ in range(3):
        update_expert_bias(both, tape)
    assert layer.router.num_steps.item() == 3
    update_expert_bias(both.eval(), tape)
    assert layer.router.num_steps.item() == 3
    other = MoEConfig(4, DenseToSparse(anneal_steps=10), FFN(6)).build(4)
    other.load_state_dict(layer.state_dict())
    assert other.half().router.temperature.item() == layer.router.temperature.item()


def test_annealing_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = MoEConfig(4, DenseToSparse(anneal_steps=3), FFN(6)).build(4).eval()
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.randn(2, 3, 4)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), layer(x))
        layer.router.after_step()
    assert counter.frame_count == 1


# Close to 2.0 up to 2 * 0.1: (2 - 1.8) / 2 = 0.1 is, (2 - 1.0) / 2 = 0.5 is not. Then 1.8 alone: 1.0 is 0.44 away.
CLOSE = torch.tensor([[[2.0, 1.8, 1.0, -1.0]]])


def test_each_gate_is_the_softmax_over_the_experts_close_to_the_best():
    routing = built(SparseMixer(0.1), 4)(CLOSE)
    assert (ids(routing), gates(routing)) == ([[0, 1]], [pytest.approx([1 / (1 + math.exp(-0.2)), 1.0])])
    # With 2 * 0.3 expert 2 is close to both: softmax of 2, 1.8, 1; then of 1.8 and 1.
    wide, total = built(SparseMixer(0.3), 4)(CLOSE), math.exp(2) + math.exp(1.8) + math.e
    assert gates(wide) == [pytest.approx([math.exp(2) / total, 1 / (1 + math.exp(-0.8))])]
    # Best -1.0 of (-1.0, -1.1): 0.1 / 1.1 = 0.09, close. (0, 0): equal, both close.
    routing = built(SparseMixer(0.05), 2)(torch.tensor([[[-1.0, -1.1], [0.0, 0.0]]]))
    assert ids(routing) == [[0, 1], [0, 1]]
    assert gates(routing) == [pytest.approx([1 / (1 + math.exp(-0.1)), 1.0]), [0.5, 1.0]]


def test_training_draws_by_the_softmax_and_thirds_the_gates_of_others_than_the_best():
    torch.manual_seed(0)
    router = built(SparseMixer(0.1), 4, training=True)
    routing = router(CLOSE.expand(1, 10_000, 4))
    first, gate = torch.tensor(ids(routing))[:, 0], torch.tensor(gates(routing))[:, 0]
    p = 1 / (1 + math.exp(0.2))  # of expert 1: 0.450; 4 sigma of 10000 draws is 0.02
    assert (set(first.tolist()), (first == 1).float().mean().item()) == ({0, 1}, pytest.approx(p, abs=0.02))
    assert torch.allclose(gate[first == 0], torch.tensor(1 - p))
    whole = torch.isclose(gate[first == 1], torch.tensor(p))
    assert whole.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(gate[first == 1][~whole], torch.tensor(p / 3))


def test_a_gate_that_counts_by_a_third_has_the_gradient_of_the_whole():
    torch.manual_seed(0)
    x = CLOSE.expand(1, 200, 4).clone().requires_grad_()
    routing = built(SparseMixer(0.1), 4, training=True)(x)
    routing.gates_N[::2].sum().backward()
    # p (1 - p) for the drawn one of the two, minus it for the other, whichever was drawn and however it counts.
    slope, drawn = math.exp(0.2) / (1 + math.exp(0.2)) ** 2, torch.tensor(ids(routing))[:, 0]
    expected = torch.where(drawn == 0, slope, -slope)
    assert torch.allclose(x.grad[0, :, 0], expected)
    assert torch.allclose(x.grad[0, :, 1], -expected)
    assert x.grad[0, :, 2:].abs().max() == 0
