"""The MoE layer as a whole: what it equals, what it does not mix, and what it works under."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import (
    FFN,
    GEGLU,
    Balance,
    MoE,
    MoEConfig,
    RoutingContext,
    SwiGLU,
    Tape,
    TokenChoice,
    aux_loss,
    aux_losses,
    moe_layers,
    record,
    set_capacity_factor,
    update_expert_bias,
)

BACKENDS = ["eager", "cpu", "grouped"]
EVERY_TERM = Balance(load_balancing=1.0, router_z=0.1, importance=1.0)


def identity_gate(layer: MoE) -> MoE:
    """Logits are the first E entries of a token."""
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(*layer.router.gate.weight.shape))
    return layer


def exact(layer: MoE) -> MoE:
    """A gate of small whole numbers: with tokens of small whole numbers its logits are exact in any order."""
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.randint(-2, 3, layer.router.gate.weight.shape))
    return layer


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).double()


def naive(layer: MoE, x: Tensor) -> Tensor:
    """The definition, token by token: top-k of the logits, softmax of the chosen, the sum over experts."""
    experts, K = layer.experts, layer.router.config.top_k
    act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[experts.activation]
    out = []
    for token in x.flatten(0, -2):
        logits = layer.router.gate.weight @ token
        chosen = logits.topk(K)
        gates = chosen.values.softmax(-1) if K > 1 else logits.softmax(-1)[chosen.indices]
        y = torch.zeros(experts.w_out.shape[-1])
        for gate, e in zip(gates, chosen.indices.tolist(), strict=True):
            up = token @ experts.w_in[e] + (0 if experts.b_in is None else experts.b_in[e])
            h = act(up) if experts.w_gate is None else act(token @ experts.w_gate[e]) * up
            y = y + gate * (h @ experts.w_out[e] + (0 if experts.b_out is None else experts.b_out[e]))
        out.append(y)
    return torch.stack(out).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("expert", [FFN(10, bias=True), SwiGLU(10), GEGLU(10)], ids=["ffn", "swiglu", "geglu"])
def test_layer_equals_its_definition_token_by_token(backend, top_k, expert):
    layer = MoEConfig(4, TokenChoice(top_k, init_scale=1.0), expert, backend=backend).build(6, out_dim=5)
    x = torch.randn(2, 7, 6)
    expected = naive(layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    # Every gradient, through the gates to the router too.
    inputs = list(layer.parameters())
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(4, capacity_factor=0.8, balance=EVERY_TERM),
        MoEConfig(4, TokenChoice(1), capacity_factor=1.0, priority="score", group="sequence", balance=EVERY_TERM),
        MoEConfig(6, TokenChoice(3, score_func="sigmoid"), SwiGLU(20), balance=EVERY_TERM),
        MoEConfig(4, TokenChoice(2, normalize=False), FFN(20, bias=True), num_shared_experts=1, balance=EVERY_TERM),
    ],
    ids=["capacity", "switch", "sigmoid", "shared"],
)
def test_backends_give_the_same_layer_output_loss_and_gradients(backend, config):
    oracle = MoEConfig(**{**vars(config), "backend": "eager"}).build(30)
    layer = MoEConfig(**{**vars(config), "backend": backend}).build(30)
    layer.load_state_dict(oracle.state_dict())
    x, dy = torch.randn(3, 11, 30), torch.randn(3, 11, 30)
    valid = RoutingContext(valid_BS=torch.rand(3, 11) < 0.8)
    found = []
    for each in (oracle, layer):
        token = x.clone().requires_grad_()
        with record(each) as tape:
            y = each(token, valid)
        ((y * dy).sum() + aux_loss(tape)).backward()
        found.append((y, token.grad, *(p.grad for p in each.parameters())))
    for expected, tensor in zip(*found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalized_to_one", [True, False])
def test_one_expert_equals_the_dense_ffn(backend, normalized_to_one):
    # Softmax over one expert is 1; the gates of two equal experts, normalized, sum to 1.
    if normalized_to_one:
        layer = MoEConfig(2, TokenChoice(2, score_func="sigmoid"), FFN(12, bias=True), backend=backend).build(8)
        with torch.no_grad():
            for weight in layer.experts.parameters():
                weight[1] = weight[0]
    else:
        layer = MoEConfig(1, TokenChoice(1), FFN(12, bias=True), backend=backend).build(8)
    experts = layer.experts
    x = torch.randn(2, 5, 8)
    dense = F.gelu(x @ experts.w_in[0] + experts.b_in[0]) @ experts.w_out[0] + experts.b_out[0]
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-6)


def test_shared_experts_add_their_dense_output_to_every_token():
    layer = MoEConfig(4, expert=FFN(6), num_shared_experts=2).build(8)
    x = torch.randn(2, 5, 8)
    y = layer(x)
    shared, layer.shared_experts = layer.shared_experts, None
    torch.testing.assert_close(y, layer(x) + shared.dense(x))
    assert shared.dense(x).abs().max() > 0


def test_a_token_no_expert_computes_is_zero_and_its_gradient_too():
    layer = identity_gate(MoEConfig(2, TokenChoice(1), capacity_factor=1.0).build(2))
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]], requires_grad=True)  # both to expert 0, which takes one
    y = layer(x)
    assert y[0, 0].abs().max() > 0
    assert y[0, 1].tolist() == [0.0, 0.0]
    y.sum().backward()
    assert x.grad[0, 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropless_output_is_equivariant_to_a_permutation_of_the_tokens(backend):
    layer = MoEConfig(5, backend=backend).build(8)
    x = torch.randn(1, 40, 8)
    order = torch.randperm(40)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-5, atol=1e-6)


def test_dropless_tokens_never_see_their_batch_mates():
    layer = exact(MoEConfig(4, TokenChoice(2), FFN(6), backend="cpu").build(8).double())
    x = whole_numbers(3, 5, 8)
    alone = torch.cat([layer(x[b : b + 1]) for b in range(3)])
    # The routing is exact here and so identical; the products of the experts are float64.
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=1e-14)
    other = torch.cat((x[:1], whole_numbers(2, 5, 8)))
    torch.testing.assert_close(layer(other)[0], layer(x)[0], rtol=0, atol=1e-14)


def test_with_capacity_by_batch_a_batch_mate_may_take_a_tokens_place_and_by_sequence_it_may_not():
    # Two sequences of two tokens; experts take ceil(0.5 * 4 / 2) = 1 by batch, ceil(0.5 * 2 / 2) = 1 by sequence.
    busy, quiet = [[3.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]
    ours = [[2.0, 0.0], [2.0, 0.0]]
    outputs = {}
    for group in ("batch", "sequence"):
        layer = identity_gate(MoEConfig(2, TokenChoice(1), FFN(4), capacity_factor=0.5, group=group).build(2).double())
        for name, mate in (("busy", busy), ("quiet", quiet)):
            outputs[group, name] = layer(torch.tensor([mate, ours]).double())[1]
    # The busy mate takes expert 0's one place; the quiet one leaves it to our first token.
    assert outputs["batch", "busy"].abs().max() == 0
    assert outputs["batch", "quiet"][0].abs().max() > 0
    assert torch.equal(outputs["sequence", "busy"], outputs["sequence", "quiet"])
    assert outputs["sequence", "busy"][0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_for_real_tokens_even_if_it_holds_nan(backend):
    layer = MoEConfig(4, capacity_factor=1.0, balance=EVERY_TERM, backend=backend).build(8)
    real = torch.randn(1, 6, 8)
    x = torch.full((1, 9, 8), torch.nan)
    at = [0, 2, 3, 5, 6, 8]
    x[:, at] = real
    valid = torch.zeros(1, 9, dtype=torch.bool)
    valid[:, at] = True
    found = {}
    for name, tokens, context in (("alone", real, None), ("padded", x, RoutingContext(valid_BS=valid))):
        token = tokens.clone().requires_grad_()
        layer.zero_grad()
        with record(layer) as tape:
            y = layer(token, context)
        loss = aux_loss(tape)
        (y.square().sum() + loss).backward()
        found[name] = (y, loss, token.grad, [p.grad.clone() for p in layer.parameters()])
    (y0, loss0, dx0, grads0), (y, loss, dx, grads) = found["alone"], found["padded"]
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y[:, at], y0, **close)
    torch.testing.assert_close(loss, loss0, **close)
    torch.testing.assert_close(dx[:, at], dx0, **close)
    for grad, grad0 in zip(grads, grads0, strict=True):
        torch.testing.assert_close(grad, grad0, **close)
    padding = ~valid
    assert y[padding].abs().max() == 0
    assert dx[padding].abs().max() == 0


def test_nan_in_padding_leaves_the_gradients_of_shared_experts_finite():
    layer = MoEConfig(4, num_shared_experts=1).build(8)
    x = torch.randn(1, 4, 8)
    x[0, 3] = torch.nan
    valid = torch.tensor([[True, True, True, False]])
    layer(x, RoutingContext(valid_BS=valid))[valid].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 8)])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5, "group": "sequence"}, {"num_shared_experts": 1}])
def test_no_tokens_run_forward_and_backward(backend, shape, options):
    layer = MoEConfig(4, expert=FFN(6, bias=True), balance=EVERY_TERM, backend=backend, **options).build(8)
    x = torch.zeros(shape, requires_grad=True)
    with record(layer) as tape:
        y = layer(x)
    assert y.shape == shape
    (y.sum() + aux_loss(tape)).backward()
    assert x.grad.shape == shape
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() == 0, name
    assert tape.entries[0].routing.tokens_per_expert_E.tolist() == [0, 0, 0, 0]


def test_all_tokens_padding_run_forward_and_backward():
    layer = MoEConfig(4, TokenChoice(noise="learned"), balance=Balance(1.0, 1.0, 1.0, 1.0)).build(8)
    context = RoutingContext(valid_BS=torch.zeros(2, 3, dtype=torch.bool))
    with record(layer) as tape:
        y = layer(torch.full((2, 3, 8), torch.nan), context)
    assert y.abs().max() == 0
    (y.sum() + aux_loss(tape)).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in layer.parameters())


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (2, 3, 4, 8), (1, 2, 3, 4, 8)])
def test_leading_dimensions_are_kept_and_do_not_change_a_token(shape):
    layer = MoEConfig(4).build(8, out_dim=5)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(1, -1, 8))[0], rtol=1e-5, atol=1e-6)


def test_leading_dimensions_before_the_sequence_are_sequences():
    # (2, 3, 4, D): six sequences of four tokens.
    layer = MoEConfig(2, TokenChoice(1), capacity_factor=0.5, group="sequence").build(8)
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(layer(x).reshape(6, 4, 8), layer(x.reshape(6, 4, 8)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "x, context, message",
    [
        (torch.zeros(8), None, r"x has shape \(8,\): an MoE layer needs at least \(tokens, dim\)"),
        (
            torch.zeros(2, 3, 8),
            RoutingContext(valid_BS=torch.ones(3, 2, dtype=torch.bool)),
            r"context.valid_BS has shape \(3, 2\), the tokens \(2, 3\)",
        ),
        (
            torch.zeros(2, 3, 8),
            RoutingContext(valid_BS=torch.ones(2, 3)),
            r"context.valid_BS is torch.float32: it must be",
        ),
    ],
)
def test_wrong_inputs_are_refused_with_what_they_are(x, context, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(4).build(8)(x, context)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "router",
    [
        TokenChoice(2),
        TokenChoice(2, noise="learned", jitter_eps=0.1, second="random", expert_bias=True),
    ],
    ids=["plain", "everything"],
)
def test_a_forward_changes_no_state(training, router):
    layer = MoEConfig(4, router, capacity_factor=0.8, priority="random").build(8).train(training)
    x, other = torch.randn(2, 6, 8), torch.randn(3, 4, 8)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    attributes = set(vars(layer)) | set(vars(layer.router)) | set(vars(layer.experts))
    torch.manual_seed(1)
    first = layer(x)
    with record(layer) as tape:
        layer(other)
    aux_loss(tape).backward()
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert attributes == set(vars(layer)) | set(vars(layer.router)) | set(vars(layer.experts))


def test_evaluation_is_deterministic_whatever_the_router_does_in_training():
    router = TokenChoice(2, noise="fixed", jitter_eps=0.1, second="random")
    layer = MoEConfig(4, router, capacity_factor=0.5, priority="random").build(8)
    x = torch.randn(2, 16, 8)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


# --- capacity in evaluation ---


def tokens_computed(layer: MoE, x: Tensor) -> list[int]:
    with record(layer) as tape:
        layer(x)
    return tape.entries[0].routing.tokens_per_expert_E.tolist()


def test_set_capacity_factor_holds_in_evaluation_inside_the_block_alone():
    layer = identity_gate(MoEConfig(2, TokenChoice(1), capacity_factor=1.0).build(2))
    x = torch.tensor([[[1.0, 0.0]] * 8])
    layer.eval()
    assert tokens_computed(layer, x) == [4, 0]  # ceil(1 * 8 / 2)
    with set_capacity_factor(layer, 0.5):
        assert tokens_computed(layer, x) == [2, 0]
        with set_capacity_factor(layer, None):
            assert tokens_computed(layer, x) == [8, 0]
        assert tokens_computed(layer, x) == [2, 0]
        layer.train()
        assert tokens_computed(layer, x) == [4, 0]
        layer.eval()
    assert tokens_computed(layer, x) == [4, 0]


def test_set_capacity_factor_may_change_the_priority_and_is_undone_after_an_error():
    layer = identity_gate(MoEConfig(2, TokenChoice(1), capacity_factor=0.25).build(2)).eval()
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [9.0, 0.0], [3.0, 0.0]]])
    before = layer.router.capacity
    with pytest.raises(RuntimeError, match="stop"), set_capacity_factor(layer, 0.25, "score"):
        # ceil(0.25 * 4 / 2) = 1: the most certain token, the third.
        assert layer(x)[0].abs().amax(-1).nonzero().flatten().tolist() == [2]
        raise RuntimeError("stop")
    assert layer.router.capacity is before
    assert layer(x)[0].abs().amax(-1).nonzero().flatten().tolist() == [0]


def test_set_capacity_factor_refuses_what_the_config_refuses_and_changes_nothing():
    model = nn.ModuleList([MoEConfig(2, TokenChoice(1)).build(2) for _ in range(2)])
    before = [layer.router.capacity for layer in model]
    for options in ({"factor": -1.0}, {"factor": 1.0, "priority": "best"}):
        with (
            pytest.raises(ValueError, match=r"eval_capacity_factor=-1.0|priority='best'"),
            set_capacity_factor(model, **options),
        ):
            pass
        assert [layer.router.capacity for layer in model] == before


# --- the bias ---


def bias_layer(rate: float = 0.125) -> MoE:
    return identity_gate(MoEConfig(3, TokenChoice(1, expert_bias=True, bias_update_rate=rate)).build(3))


LOADED = torch.eye(3)[[0, 0, 0, 1]][None]  # loads 3, 1, 0 around 4/3


def test_update_expert_bias_moves_by_the_sign_of_the_load():
    layer = bias_layer()
    with record(layer) as tape:
        layer(LOADED)
    assert layer.router.expert_bias.tolist() == [0.0, 0.0, 0.0]
    update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.125, 0.125, 0.125]


def test_update_expert_bias_over_merged_micro_batches_is_one_step():
    layer = bias_layer()
    steps = Tape()
    for x in (LOADED, torch.eye(3)[[2, 2, 2, 2]][None]):  # together 3, 1, 4 around 8/3
        with record(layer) as tape:
            layer(x)
        steps = steps.merge(tape.detach())
    update_expert_bias(layer, steps)
    assert layer.router.expert_bias.tolist() == [-0.125, 0.125, -0.125]


def test_update_expert_bias_counts_both_passes_of_a_layer_used_twice():
    layer = bias_layer()
    with record(layer) as tape:
        layer(LOADED)
        layer(torch.eye(3)[[1, 1, 1]][None])  # together 3, 4, 0 around 7/3
    update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.125, -0.125, 0.125]


def test_update_expert_bias_leaves_padding_frozen_layers_and_other_routers_alone():
    layer = bias_layer()
    context = RoutingContext(valid_BS=torch.tensor([[False, False, True, True]]))  # loads 1, 1, 0 around 2/3
    with record(layer) as tape:
        layer(LOADED, context)
    layer.eval()
    update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [0.0] * 3
    layer.train()
    update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.125, -0.125, 0.125]
    plain = MoEConfig(3).build(3)
    with record(plain) as tape:
        plain(LOADED)
    update_expert_bias(plain, tape)
    assert plain.router.expert_bias is None


def test_bias_updates_even_a_skewed_load_out():
    # One expert is every token's first choice by 0.05 of its sigmoid score; steps of 0.01 must spread the load.
    layer = MoEConfig(4, TokenChoice(1, score_func="sigmoid", expert_bias=True, bias_update_rate=0.01)).build(4)
    identity_gate(layer)
    x = torch.randn(1, 400, 4) * 0.1 + torch.tensor([0.8, 0.0, 0.0, 0.0])
    shares = []
    for _ in range(40):
        with record(layer) as tape:
            layer(x)
        update_expert_bias(layer, tape)
        shares.append(int(tape.entries[0].routing.chosen_per_expert_E.max()) / 400)
    assert shares[0] == 1.0
    assert shares[-1] < 0.4


# --- the loss under accumulation and scaling ---


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    with record(model) as tape:
        y = model(x)
    return y.square().mean() + aux_loss(tape)


def test_under_accumulation_the_gradient_is_the_mean_of_the_micro_batches():
    layer = MoEConfig(4, balance=EVERY_TERM).build(8)
    batches = [torch.randn(2, 6, 8), torch.randn(2, 6, 8) + 0.5]
    each = []
    for x in batches:
        layer.zero_grad()
        loss_of(layer, x).backward()
        each.append(gradients(layer))
    layer.zero_grad()
    for x in batches:
        (loss_of(layer, x) / 2).backward()
    for name, grad in gradients(layer).items():
        torch.testing.assert_close(grad, (each[0][name] + each[1][name]) / 2, rtol=1e-5, atol=1e-7)


def test_a_scaled_loss_gives_gradients_scaled_exactly():
    # What a GradScaler does: a power of two, so that not a bit is lost.
    layer = MoEConfig(4, balance=EVERY_TERM).build(8)
    x = torch.randn(2, 6, 8)
    loss_of(layer, x).backward()
    plain = gradients(layer)
    layer.zero_grad()
    (loss_of(layer, x) * 2.0**16).backward()
    for name, grad in gradients(layer).items():
        assert torch.equal(grad, plain[name] * 2.0**16), name


def test_the_aux_loss_reaches_router_and_tokens_and_never_the_experts():
    layer = MoEConfig(4, balance=EVERY_TERM).build(8)
    x = torch.randn(2, 6, 8, requires_grad=True)
    with record(layer) as tape:
        layer(x)
    aux_loss(tape).backward()
    assert layer.router.gate.weight.grad.abs().max() > 0
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


# --- autocast ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [0, 1])
def test_under_autocast_the_router_stays_exactly_as_it_is_and_experts_run_in_bfloat16(backend, shared):
    layer = MoEConfig(4, expert=SwiGLU(16), num_shared_experts=shared, backend=backend).build(8)
    x = torch.randn(2, 6, 8)
    with record(layer) as tape:
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    plain, cast = (entry.routing for entry in tape.entries)
    assert torch.equal(cast.logits_TE, plain.logits_TE)
    assert torch.equal(cast.gates_N, plain.gates_N)
    assert cast.logits_TE.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    # A bfloat16 number is good to 2^-8; three products and a sum of numbers of this size.
    assert (y - expected).abs().max() < 4 * 2**-8 * expected.abs().max()
    (y.sum() + aux_loss(tape)).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_equals_a_bfloat16_copy_of_the_experts(backend):
    layer = MoEConfig(4, expert=FFN(16, bias=True), backend=backend).build(8)
    copied = copy.deepcopy(layer)
    copied.experts.bfloat16()
    x = torch.randn(2, 6, 8).bfloat16()  # exact in both
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert torch.equal(copied(x), y)


# --- checkpointing ---


class Net(nn.Module):
    """Two residual MoE blocks, maybe checkpointed; ``noise`` in their routers if asked for."""

    def __init__(self, mode: str = "none", backend: str = "auto", **router) -> None:
        super().__init__()
        config = MoEConfig(4, TokenChoice(2, **router), FFN(12), balance=EVERY_TERM, backend=backend)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([config.build(8), config.build(8)])
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            run: Callable[[Tensor], Tensor] = block
            if self.mode != "none":
                x = x + checkpoint(run, x, use_reentrant=self.mode == "reentrant")
            else:
                x = x + run(x)
        return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("router", [{}, {"noise": "learned", "second": "random"}], ids=["plain", "random"])
def test_checkpointing_counts_nothing_twice_and_changes_no_gradient(backend, backward_inside, router):
    plain, checkpointed = Net("none", backend, **router), Net("non-reentrant", backend, **router)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 8)
    found = []
    for net in (plain, checkpointed):
        torch.manual_seed(5)
        with contextlib.ExitStack() as stack:
            tape = stack.enter_context(record(net))
            y = net(x)
            if not backward_inside:
                stack.close()
            losses = aux_losses(tape)
            (y.square().mean() + losses.total).backward()
            if backward_inside:
                stack.close()
        assert [entry.name for entry in tape.entries] == ["blocks.0", "blocks.1"]
        found.append({"y": y, "aux": losses.total, **losses.terms, **gradients(net)})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 5 + len(list(plain.parameters()))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_reentrant_checkpointing_is_refused_in_one_line():
    net = Net("reentrant")
    with record(net) as tape:
        net(torch.randn(2, 6, 8))
    with pytest.raises(RuntimeError, match=r"'blocks.0' ran without gradients.*use_reentrant=False") as error:
        aux_loss(tape)
    assert "\n" not in str(error.value)


def test_passes_without_gradients_have_a_loss_to_log_where_none_are_wanted():
    net = Net()
    x = torch.randn(2, 6, 8)
    with torch.no_grad(), record(net) as tape:
        net(x)
    assert aux_loss(tape).isfinite()  # the block was opened without gradients
    net.eval()
    with record(net) as tape, torch.no_grad():
        net(x)
    assert aux_loss(tape).isfinite()  # evaluation
    net.train()
    for p in net.parameters():
        p.requires_grad_(False)
    with record(net) as tape:
        net(x)
    assert not aux_loss(tape).requires_grad  # a frozen model


# --- copies and checkpoints on disk ---


def full_layer() -> MoE:
    router = TokenChoice(2, noise="learned", expert_bias=True)
    layer = MoEConfig(4, router, SwiGLU(12, bias=True), num_shared_experts=1, balance=EVERY_TERM).build(8)
    layer.router.expert_bias = torch.tensor([0.1, -0.2, 0.3001, 0.0])
    return layer.eval()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_compute_the_same(duplicate):
    layer = full_layer()
    twin = duplicate(layer)
    x = torch.randn(2, 6, 8)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.router.expert_bias, layer.router.expert_bias)
    assert twin.router.expert_bias is not layer.router.expert_bias


def test_state_dict_has_the_documented_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in full_layer().state_dict().items()}
    assert shapes == {
        "router.expert_bias": (4,),
        "router.gate.weight": (4, 8),
        "router.gate.noise_weight": (4, 8),
        "experts.w_in": (4, 8, 12),
        "experts.w_gate": (4, 8, 12),
        "experts.w_out": (4, 12, 8),
        "experts.b_in": (4, 12),
        "experts.b_out": (4, 8),
        "shared_experts.w_in": (1, 8, 12),
        "shared_experts.w_gate": (1, 8, 12),
        "shared_experts.w_out": (1, 12, 8),
        "shared_experts.b_in": (1, 12),
        "shared_experts.b_out": (1, 8),
    }
    assert set(MoEConfig(4).build(8).state_dict()) == {"router.gate.weight", "experts.w_in", "experts.w_out"}


def test_a_state_dict_saved_and_loaded_with_weights_only_gives_the_same_layer():
    layer = full_layer()
    file = io.BytesIO()
    torch.save({"state": layer.state_dict(), "config": MoEConfig(4).to_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = full_layer()
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.router.expert_bias.zero_()
    twin.load_state_dict(loaded["state"])
    x = torch.randn(2, 6, 8)
    assert torch.equal(twin(x), layer(x))
    assert MoEConfig.from_dict(loaded["config"]) == MoEConfig(4)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_model_keeps_its_expert_bias_in_float32_to_the_last_bit(cast):
    layer = full_layer()
    before = layer.router.expert_bias.clone()
    getattr(layer, cast)()
    assert layer.experts.w_in.dtype == getattr(torch, cast)
    assert layer.router.expert_bias.dtype == torch.float32
    assert torch.equal(layer.router.expert_bias, before)
    layer.float()
    assert torch.equal(layer.router.expert_bias, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_layer_runs_and_trains(backend):
    layer = MoEConfig(4, expert=FFN(16), balance=EVERY_TERM, backend=backend).build(8).bfloat16()
    x = torch.randn(2, 6, 8).bfloat16()
    with record(layer) as tape:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y.sum() + aux_loss(tape)).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.abs().max() > 0 for p in layer.parameters())


def test_moe_layers_are_listed_by_name_in_module_order():
    net = Net()
    assert list(moe_layers(net)) == ["blocks.0", "blocks.1"]
    assert list(moe_layers(net.blocks[0])) == [""]
    assert moe_layers(net.stem) == {}


def kept_floats(num_experts: int, tokens: int, top_k: int) -> int:
    """Numbers of hidden width that a forward of the cpu backend keeps for its backward: (rows, F) tensors."""
    dim, hidden = 8, 24
    layer = MoEConfig(num_experts, router=TokenChoice(top_k=top_k), expert=FFN(hidden), backend="cpu").build(dim)
    seen: dict[int, int] = {}

    def pack(t):
        if t.ndim == 2 and t.shape[-1] == hidden:
            seen[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(torch.randn(1, tokens, dim, requires_grad=True))
    assert y.requires_grad
    return sum(seen.values())


def test_memory_kept_grows_with_tokens_times_top_k_and_not_with_experts():
    # One pre-activation a routed pair: T * K * F.
    assert kept_floats(4, tokens=100, top_k=2) == 100 * 2 * 24
    assert kept_floats(64, tokens=100, top_k=2) == 100 * 2 * 24
    assert kept_floats(64, tokens=300, top_k=8) == 300 * 8 * 24
