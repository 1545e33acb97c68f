"""Attention experts: the layer against a slow loop over its pairs, its costs, its masks, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from gradients import close_gradients
from pair_routers import PAIR_ROUTERS
from torch import Tensor

import core
from core.testing.check import FLOAT32, close, same_step, step
from core.testing.router_case import RouterCase, seeded

D, E, HEAD, HEADS = 8, 8, 4, 2


def build(router: core.RouterConfig = core.TokenChoice(2), causal: bool = False, **options) -> core.AttentionMoE:
    with seeded(0):
        layer = core.MoEConfig(E, router, core.AttentionExperts(HEAD, HEADS), **options).build(D, causal=causal)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert isinstance(layer, core.AttentionMoE)
    return layer.double()


def slow(
    layer: core.AttentionMoE,
    x_BSD: Tensor,
    routing: core.Routing,
    valid_BS: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the layer's output, pair by pair, head by head, key by key."""
    B, S, _ = x_BSD.shape
    y_TD = [torch.zeros(D, dtype=x_BSD.dtype) for _ in range(B * S)]
    w_k, w_v = layer.kv.weight.split(HEADS * HEAD)
    on_input = layer.router.gates_on == "input"
    pairs = zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N, strict=True)
    for t, e, gate in pairs:
        if e == layer.num_experts:
            continue
        b, s = divmod(t, S)
        seen = [
            j
            for j in range(S)
            if (valid_BS is None or valid_BS[b, j])
            and (mask is None or (mask if mask.ndim == 2 else mask[b])[s, j])
            and (not layer.causal or j <= s)
        ]
        q = (x_BSD[b, s] * (gate if on_input else 1.0)) @ layer.experts.w_q[e]
        attended = []
        for head in range(HEADS):
            part = slice(head * HEAD, (head + 1) * HEAD)
            scores = torch.stack([q[part] @ (w_k[part] @ x_BSD[b, j]) / HEAD**0.5 for j in seen])
            attended.append(sum(p * (w_v[part] @ x_BSD[b, j]) for p, j in zip(scores.softmax(0), seen, strict=True)))
        y = torch.cat(attended) @ layer.experts.w_out[e]
        y_TD[t] = y_TD[t] + (y if on_input else gate * y)
    return torch.stack(y_TD).unflatten(0, (B, S))


def test_keys_and_values_are_made_of_other_states():
    layer = build(causal=True)
    x, seen = torch.randn(2, 2, 5, D, dtype=torch.float64)
    y = layer(x, seen=seen)
    # One query at a time: the keys are those of ``seen`` up to its place.
    routing, (w_k, w_v) = layer.router(x), layer.kv.weight.split(HEADS * HEAD)
    expected = torch.zeros_like(x).flatten(0, 1)
    for t, e, gate in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N, strict=True):
        b, s = divmod(t, 5)
        q = (x[b, s] @ layer.experts.w_q[e]).view(HEADS, HEAD)
        k, v = ((seen[b, : s + 1] @ w.T).view(s + 1, HEADS, HEAD) for w in (w_k, w_v))
        weights = (torch.einsum("hd,shd->hs", q, k) / HEAD**0.5).softmax(-1)
        expected[t] += gate * torch.einsum("hs,shd->hd", weights, v).flatten() @ layer.experts.w_out[e]
    torch.testing.assert_close(y.flatten(0, 1), expected)
    torch.testing.assert_close(layer(x, seen=x), layer(x))


def compare(layer: core.AttentionMoE, x: Tensor, context: core.RoutingContext, mask: Tensor | None = None) -> None:
    """Hold a step of the layer to the slow loop, in output and all gradients."""
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    results = []
    for fast in (True, False):
        copied, own = copy.deepcopy(layer), x.clone().requires_grad_()
        with seeded(3), core.record(copied) as tape:
            y = copied(own, context, mask=mask)
        (entry,) = tape.entries
        if not fast:
            with seeded(3):
                routing = copied.router(own, context)
            y = slow(copied, own, routing, context.valid_BS, mask)
        (y * weight).sum().backward()
        grads = {"the tokens": own.grad, **{n: p.grad for n, p in copied.named_parameters()}}
        results.append((y.detach(), grads, entry.routing))
    (y, grads, routing), (expected, wanted, _) = results
    close(y, expected, "the output", 1e-12)
    assert (routing.expert_ids_N < layer.num_experts).any()
    close_gradients(grads, wanted, 1e-10)


ROUTERS = ["TokenChoice", "ExpertChoice", "Hash", "ReLURouting", "Ensemble", "gates on the input", "small tiles"]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_kind_of_router_gives_the_slow_loop_s_output_and_gradients(name):
    router = PAIR_ROUTERS[name]
    x, context = RouterCase(router, E, D, 0).padded()
    full = {"capacity_factor": 0.6} if "capacity_factor" in router.layer_options else {}
    for training, options in ((False, {}), (True, full)):
        compare(build(router, **options).train(training), x.double(), context)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", ["none", "one", "each"])
def test_masks_give_the_slow_loop_s_output_and_gradients(causal, padded, masked):
    x, context = RouterCase(core.TokenChoice(2), E, D, 0).padded()
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    mask = mask | torch.eye(6, dtype=torch.bool)  # a real query keeps a key
    mask = {"none": None, "one": mask[0], "each": mask}[masked]
    compare(build(causal=causal), x.double(), context if padded else core.RoutingContext(), mask)


def test_an_example_by_hand():
    layer = core.MoEConfig(2, core.TokenChoice(1), core.AttentionExperts(head_dim=1)).build(2)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[10.0, 0.0], [-10.0, 0.0]]))  # by the sign of the first
        layer.kv.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # keys are the second, values the first
        layer.experts.w_q.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]]))
        layer.experts.w_out.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]]))
    y = layer(torch.tensor([[1.0, 0.0], [-2.0, torch.log(torch.tensor(3.0))]]))
    # Token 0: query 1, keys (0, log 3), shares 1/4 and 3/4 of the values 1 and -2: -1.25, to the first place.
    # Token 1: query 0, half of each: -0.5, ten times to the second place. A gate of top-1 is its softmax, 1 here.
    torch.testing.assert_close(y, torch.tensor([[-1.25, 0.0], [0.0, -5.0]]), rtol=1e-6, atol=1e-6)


def test_what_padding_holds_reaches_nobody():
    x, context = RouterCase(core.TokenChoice(2), E, D, 0).padded()
    layer = build().float().train()
    expected = step(layer, x, context)
    held = step(layer, x.masked_fill(~context.valid_BS[..., None], torch.nan), context)
    assert not held["output"][~context.valid_BS].any()
    for name, value in held.items():
        assert value.isfinite().all(), name
        close(value, expected[name], name)


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize("router", [core.TokenChoice(2), core.ExpertChoice()], ids=["tokens", "experts"])
def test_every_backend_gives_the_oracle_s_step(router, backend):
    x, context = RouterCase(router, E, D, 0).padded()
    expected = step(build(router, backend="eager").float(), x, context)
    same_step(step(build(router, backend=backend).float(), x, context), expected)


def test_tokens_may_be_one_sequence_or_have_more_axes_and_come_out_as_wide_as_asked():
    x = torch.randn(2, 3, 5, D).double()
    layer = build()
    y = layer(x)
    torch.testing.assert_close(y[1, 2], layer(x[1, 2]), rtol=1e-9, atol=1e-12)
    for B, S in ((0, 4), (2, 0), (1, 1)):
        x = torch.randn(B, S, D).double().requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == (B, S, D)
        assert y.isfinite().all()
    wide = core.MoEConfig(E, core.TokenChoice(2), core.AttentionExperts(HEAD)).build(D, 3)
    assert wide(torch.randn(2, 5, D)).shape == (2, 5, 3)


# ---- costs


def test_costs_are_numel_and_the_counter_s():
    config = core.MoEConfig(E, core.TokenChoice(3), core.AttentionExperts(HEAD, HEADS))
    for out_dim in (None, 6):
        layer = config.build(D, out_dim)
        assert config.num_params(D, out_dim) == sum(p.numel() for p in layer.parameters())
        assert config.active_params(D, out_dim) == core.active_params(layer)
        for S, causal in ((7, False), (7, True), (1, False)):
            layer.causal = causal
            counted = core.count_flops(layer, torch.randn(2, S, D))
            assert config.flops_per_token(D, out_dim, tokens_per_sequence=S) * 2 * S == counted
    # By hand: the gate 2 D E; keys and values 2 D 2 h d; of each of 3 pairs two products and attention to 7 keys.
    by_hand = 2 * D * E + 4 * D * HEADS * HEAD + 3 * (4 * D * HEADS * HEAD + 4 * 7 * HEADS * HEAD)
    assert config.flops_per_token(D, tokens_per_sequence=7) == by_hand
    with pytest.raises(ValueError, match=r"^AttentionExperts needs tokens_per_sequence: attention costs"):
        config.flops_per_token(D)


# ---- what a layer does with a tape, files and graphs


def test_experts_have_matrices_and_starts_of_their_own():
    shapes, experts = [], build().experts
    experts.init_each(lambda matrix: shapes.append(tuple(matrix.shape)))
    assert shapes == [(D, HEADS * HEAD)] * E + [(HEADS * HEAD, D)] * E
    of_one = {n: tuple(w.shape) for n, w in experts.weights_of(3).items()}
    assert of_one == {"w_q": (D, HEADS * HEAD), "w_out": (HEADS * HEAD, D)}


def test_on_the_meta_device_emptied_and_reset_a_layer_starts():
    with torch.device("meta"):
        layer = core.MoEConfig(E, core.TokenChoice(2), core.AttentionExperts(HEAD)).build(D)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(77)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert max(float(p.detach().abs().max()) for p in layer.parameters()) < 3


def test_half_precision_and_autocast_give_the_output_rounded():
    x = torch.randn(2, 6, D).bfloat16()
    layer = build().bfloat16()
    expected = copy.deepcopy(layer).float()(x.float())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y.float(), expected, "the output in bfloat16", 3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(layer.float()(x.float()).float(), expected, "the output under autocast", 3e-2)


def test_outputs_are_masked_in_training_alone():
    layer, x = build(expert_output_masking=0.5), torch.randn(2, 6, D).double()
    assert torch.equal(layer.eval()(x), build()(x))
    with seeded(0):
        assert not torch.equal(layer.train()(x), build()(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported_a_layer_is_the_same():
    x, context = RouterCase(core.TokenChoice(2), E, D, 0).padded()
    layer = build().float()
    expected = step(layer, x, context)
    same_step(step(layer, x, context, run=torch.compile(layer, backend="eager", fullgraph=True)), expected)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(layer.eval(), (torch.randn(3, 6, D),), dynamic_shapes=({0: dynamic, 1: dynamic},))
    x = torch.randn(2, 7, D)
    close(program.module()(x), layer(x), "the output of 2 sequences of 7 tokens", FLOAT32)


# ---- what is refused


SHARED = r"^num_shared_experts=1 with AttentionExperts, which computes attention$"
X = torch.randn(2, 6, D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: core.MoEConfig(4, core.SoftSlots(), core.AttentionExperts()),
            r"^AttentionExperts computes attention: not with the slots of SoftSlots",
        ),
        (lambda: core.MoEConfig(4, num_shared_experts=1, expert=core.AttentionExperts()), SHARED),
        (lambda: core.MoEConfig(4, num_shared_experts=1, shared_expert=core.AttentionExperts()), SHARED),
        (
            lambda: core.MoEConfig(4, num_shared_experts=1, expert=core.AttentionExperts(), shared_expert=core.FFN()),
            SHARED,
        ),
        (
            lambda: core.MoEConfig(4, core.ExpertChoice(), core.AttentionExperts()).build(D, causal=True),
            "lets later tokens change earlier ones: not for a causal decoder",
        ),
        (
            lambda: build()(X, mask=torch.ones(2, 6, dtype=torch.bool)),
            r"^mask has shape \(2, 6\), for 2 sequences of 6 tokens: \(S, S\) or",
        ),
        (lambda: build()(X, mask=torch.ones(6, 6)), r"^mask is torch.float32: it must be bool"),
        (lambda: build()(X, seen=X[:, :4]), r"^seen has shape \(2, 4, 8\), the tokens \(2, 6, 8\)$"),
        (lambda: build()(X[..., :7]), "x has width 7, the layer is for dim=8"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
