"""Soft slots and merged experts against their definitions: by hand, as loops, and what may change what."""

import math

import pytest
import torch
import torch.nn.functional as F
from grids import pairwise
from routed import recorded
from softened import BACKENDS, EXPERTS, LORY, MERGES, ROUTERS, VALID, build
from torch import Tensor

from core import FFN, Experts, MoE, MoEConfig, RoutingContext, SwiGLU, record
from core.experts import FFNExperts
from core.layers import MergedMoE, SoftMoE
from core.routing.soft.soft import Merge, SoftSlots


def one_expert(experts: FFNExperts, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """``x`` through the FFN of these parameters."""
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[experts.activation]
    h = x @ parts["w_in"] + parts.get("b_in", torch.zeros(()))
    h = act(x @ parts["w_gate"]) * h if "w_gate" in parts else act(h)
    return h @ parts["w_out"] + parts.get("b_out", torch.zeros(()))


def expert(experts: FFNExperts, e: int) -> dict[str, Tensor]:
    return {name: p[e] for name, p in experts.named_parameters()}


def naive_slots(layer: SoftMoE, x: Tensor) -> Tensor:
    """Compute the definition, sequence by sequence and slot by slot."""
    phi, scale = layer.router.phi, layer.router.scale
    E, P, _ = phi.shape
    out = []
    for x_SD in x:
        logits = torch.zeros(len(x_SD), E, P, dtype=x.dtype)
        for t, token in enumerate(x_SD):
            for e in range(E):
                for p in range(P):
                    logits[t, e, p] = scale * (token / token.norm()) @ (phi[e, p] / phi[e, p].norm())
        dispatch = logits.exp() / logits.exp().sum(0)
        combine = logits.exp() / logits.exp().sum((1, 2), keepdim=True)
        y = torch.zeros(len(x_SD), layer.experts.w_out.shape[-1], dtype=x.dtype)
        for e in range(E):
            for p in range(P):
                slot = (dispatch[:, e, p, None] * x_SD).sum(0)
                y = y + combine[:, e, p, None] * one_expert(layer.experts, slot, expert(layer.experts, e))
        out.append(y)
    return torch.stack(out)


def naive_merge(layer: MergedMoE, x: Tensor) -> Tensor:
    """Compute the definition, sequence by sequence and segment by segment."""
    config, gate = layer.router.config, layer.router.gate.weight
    E, out = gate.shape[0], []
    for x_SD in x:
        step = config.segment_length if config.kind == "lory" else max(len(x_SD), 1)
        segments = list(x_SD.split(step)) if len(x_SD) else []
        y = [x.new_zeros(0, layer.experts.w_out.shape[-1])]
        for i, segment in enumerate(segments):
            source = segments[max(i - 1, 0)] if config.kind == "lory" else segment
            p = (gate @ source.mean(0)).softmax(0)
            if config.kind == "meo":
                kept = p.topk(2).indices
                p = torch.zeros(E, dtype=p.dtype).scatter(0, kept, p[kept] / p[kept].sum())
            if config.kind == "lory" and i == 0:
                p = p.detach() if config.first == "own" else torch.full_like(p, 1 / E)
            parts = {}
            for e in range(E):
                for name, w in expert(layer.experts, e).items():
                    parts[name] = parts.get(name, 0) + p[e] * w
            y.append(one_expert(layer.experts, segment, parts))
        out.append(torch.cat(y))
    return torch.stack(out)


def naive(layer: MoE, x: Tensor) -> Tensor:
    return naive_slots(layer, x) if isinstance(layer, SoftMoE) else naive_merge(layer, x)


# --- by hand ---


def test_slots_by_hand():
    # phi = e1 and e2 with scale log 2, tokens 5 e1 and 2 e2: logits log 2 on the diagonal, 0 beside it.
    layer = MoEConfig(2, SoftSlots(), FFN(2, "relu")).build(2)
    with torch.no_grad():
        layer.router.phi.copy_(torch.tensor([[[7.0, 0.0]], [[0.0, 0.5]]]))  # of any length
        layer.router.scale.fill_(math.log(2))
        # Expert 0 is the identity, expert 1 ten times it, on positive numbers.
        layer.experts.w_in.copy_(torch.eye(2).expand(2, 2, 2))
        layer.experts.w_out.copy_(torch.stack((torch.eye(2), 10 * torch.eye(2))))
    with record(layer) as tape:
        y = layer(torch.tensor([[[5.0, 0.0], [0.0, 2.0]]]))
    routing = tape.entries[0].routing
    third = [[2 / 3, 1 / 3], [1 / 3, 2 / 3]]  # 2 / (2 + 1)
    torch.testing.assert_close(routing.dispatch_GSEP[0, :, :, 0], torch.tensor(third))
    torch.testing.assert_close(routing.combine_GSEP[0, :, :, 0], torch.tensor(third))
    # Slots (10/3, 2/3) and (5/3, 4/3); expert 1 makes (50/3, 40/3) of its own.
    # Token 0: 2/3 (10/3, 2/3) + 1/3 (50/3, 40/3) = (70/9, 44/9); token 1: 1/3 and 2/3 of them: (110/9, 82/9).
    torch.testing.assert_close(y, torch.tensor([[[70 / 9, 44 / 9], [110 / 9, 82 / 9]]]))


def merged_by_hand(router: Merge, length: int = 2) -> MergedMoE:
    """Expert e multiplies a positive number by ``10^e``; logits are (x, 0, -x) of a mean of x, in dimension 1."""
    layer = MoEConfig(3, router, FFN(1, "relu")).build(1)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        layer.experts.w_in.fill_(1.0)
        layer.experts.w_out.copy_(torch.tensor([1.0, 10.0, 100.0])[:, None, None])
    return layer


LOG2 = math.log(2)


def test_smear_and_lory_by_hand():
    # Mean log 2: weights 2, 1, 1/2 over 7/2 = 4/7, 2/7, 1/7; the factor is (4 + 20 + 100) / 7 = 124 / 7.
    y = merged_by_hand(Merge("smear"))(torch.tensor([[[0.5 * LOG2], [1.5 * LOG2]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([0.5, 1.5]) * LOG2 * 124 / 7)
    # Segments (a, b), (c, d), (e): the second takes the weights of the mean of the first, the third of the second.
    x = torch.tensor([[[0.5], [1.5], [1.0], [3.0], [2.0]]]) * LOG2
    uniform, one, two = 111 / 3, 124 / 7, (16 * 1 + 4 * 10 + 1 * 100) / 21  # means log 2, then 2 log 2: 4, 1, 1/4
    expected = x.flatten() * torch.tensor([uniform, uniform, one, one, two])
    torch.testing.assert_close(merged_by_hand(Merge("lory", segment_length=2))(x).flatten(), expected)
    own = expected * torch.tensor([one / uniform, one / uniform, 1.0, 1.0, 1.0])
    torch.testing.assert_close(merged_by_hand(Merge("lory", segment_length=2, first="own"))(x).flatten(), own)


@pytest.mark.parametrize(
    "options, factor",
    [
        ({"top_k": 2}, (2 * 1 + 1 * 10) / 3),  # 2 and 1 over 3
        ({}, (2 * 1 + 1 * 10) / 3),  # the default
        # Not normalized, both matrices shrink: w_in to 4/7 + 2/7.
        ({"top_k": 2, "normalize": False}, 6 / 7 * (4 * 1 + 2 * 10) / 7),
        ({"top_k": 1}, 4 / 7 * 4 / 7),
        ({"top_k": 3}, 124 / 7),
    ],
)
def test_meo_by_hand(options, factor):
    y = merged_by_hand(Merge("meo", **options))(torch.tensor([[[0.5 * LOG2], [1.5 * LOG2]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([0.5, 1.5]) * LOG2 * factor)


# --- against the loops ---


@pytest.mark.parametrize("backend, config, slots", pairwise(BACKENDS, EXPERTS, [1, 3]), ids=str)
def test_soft_moe_equals_the_loop_over_slots(backend, config, slots):
    layer, x = build(SoftSlots(slots), config, backend=backend), torch.randn(2, 5, 8)
    assert isinstance(layer, SoftMoE)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", EXPERTS, ids=str)
@pytest.mark.parametrize("router", MERGES, ids=str)
def test_merged_moe_equals_the_loop_over_segments(config, router):
    layer = build(router, config)
    assert isinstance(layer, MergedMoE)
    for length in (1, 2, 6, 7):
        x = torch.randn(3, length, 8)
        torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_gradients_equal_those_of_the_loop_and_one_sequence_may_have_two_dimensions(router):
    layer = build(router, SwiGLU(6, bias=True)).double()
    x, gradients = torch.randn(2, 7, 8, dtype=torch.float64), []
    for run in (layer, lambda x: naive(layer, x)):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        gradients.append([given.grad, *(p.grad.clone() for p in layer.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer(x)[1], layer(x[1]))
    torch.testing.assert_close(layer(x.view(2, 1, 7, 8)).view(2, 7, 8), layer(x))


class Doubling(Experts):
    """A user's own experts: rows times ``e + 1``; no method ``compute_merged``."""

    num_experts = 4

    def compute_rows(self, rows):
        row_R = torch.arange(len(rows.row_index_R))
        factor_R = torch.bucketize(row_R, rows.offsets_E, right=True) + 1
        return rows.with_output(rows.materialize() * factor_R[:, None])


def test_a_users_own_experts_run_on_slots_and_are_refused_where_they_cannot_be_merged():
    soft = build(SoftSlots(2))
    soft.experts = Doubling()
    x = torch.randn(2, 5, 8)
    with record(soft) as tape:
        y = soft(x)
    routing = tape.entries[0].routing
    slots = torch.einsum("gsep,gsd->gepd", routing.dispatch_GSEP, x) * torch.tensor([1.0, 2, 3, 4])[:, None, None]
    torch.testing.assert_close(y, torch.einsum("gsep,gepd->gsd", routing.combine_GSEP, slots))
    merged = build(Merge())
    merged.experts = Doubling()
    with pytest.raises(NotImplementedError, match=r"Doubling cannot be merged"):
        merged(x)


# --- padding, zeros and time ---


def test_padding_has_share_zero_exactly_shares_sum_to_one_and_a_token_of_zeros_has_no_direction():
    layer = build(SoftSlots(2))
    tape = recorded(layer, torch.randn(2, 7, 8), RoutingContext(valid_BS=VALID))
    routing = tape.entries[0].routing
    assert routing.dispatch_GSEP[~VALID].abs().max() == routing.combine_GSEP[~VALID].abs().max() == 0
    torch.testing.assert_close(routing.dispatch_GSEP.sum(1), torch.ones(2, 4, 2))
    torch.testing.assert_close(routing.combine_GSEP.sum((2, 3)), VALID.float())
    layer, x = build(SoftSlots(2)), torch.zeros(1, 3, 8, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert all(tensor.isfinite().all() for tensor in (y, x.grad, layer.router.phi.grad))


def test_lory_means_are_of_the_real_tokens_of_the_segment_before():
    layer, x = build(LORY), torch.randn(2, 7, 8)
    tape = recorded(layer, x, RoutingContext(valid_BS=VALID))
    weights = tape.entries[0].routing.weights_GE.unflatten(0, (2, 3))
    gate = layer.router.gate.weight
    # Segments of VALID[1]: (1, 1, 0), (1, 0, 1), (0).
    torch.testing.assert_close(weights[1, 0], torch.full((4,), 0.25))
    torch.testing.assert_close(weights[1, 1], (gate @ x[1, :2].mean(0)).softmax(0))
    torch.testing.assert_close(weights[1, 2], (gate @ x[1, [3, 5]].mean(0)).softmax(0))
    nothing = torch.tensor([[False] * 3 + [True] * 4])
    tape = recorded(layer, x[:1], RoutingContext(valid_BS=nothing))
    # Nothing real before the second segment: uniform, as for the first.
    torch.testing.assert_close(tape.entries[0].routing.weights_GE[1], torch.full((4,), 0.25))


def test_lory_is_causal_but_for_a_first_segment_of_its_own():
    # The conformance suite checks what each says.
    assert [router.is_causal for router in ROUTERS] == [False, False, False, True, False]
    message = r"router Merge\(kind='lory'\) \(arXiv 2405\.03133\) lets later tokens change earlier ones"
    with pytest.raises(ValueError, match=message):
        MoEConfig(4, ROUTERS[4]).build(8, causal=True)


# --- expert dropout ---


def test_expert_dropout_drops_in_training_alone_and_the_rest_sums_to_one():
    layer, x = build(Merge("smear", expert_dropout=0.5)), torch.randn(2000, 1, 8)
    with record(layer) as tape:
        layer(x)
        layer.eval()
        layer(x)
    dropped, kept = (entry.routing.weights_GE for entry in tape.entries)
    torch.testing.assert_close(dropped.sum(-1), torch.ones(2000))
    assert (kept > 0).all()
    # Half of the weights, but all four stay where all four fell: 1/2 - 1/16 = 0.4375. A standard deviation is at
    # most sqrt(1/4 / 8000) = 0.0056 for independent draws; 5 of them.
    assert (dropped == 0).double().mean().item() == pytest.approx(0.4375, abs=0.028)
    assert torch.equal(layer(x), layer(x))
    ratio = dropped / kept
    largest = ratio.amax(-1, keepdim=True).expand_as(ratio)
    torch.testing.assert_close(ratio[dropped > 0], largest[dropped > 0], rtol=1e-4, atol=1e-5)
