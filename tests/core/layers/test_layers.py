"""The MoE layer against its definition: output, batch-mates, padding, shapes, state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from grids import pairwise
from layered import BACKENDS, EVERY_TERM, Net, identity_gate
from torch import Tensor

from core import (
    FFN,
    GEGLU,
    MLP,
    Balance,
    Hash,
    Merge,
    Mixed,
    MoE,
    MoEConfig,
    RoutingContext,
    SoftSlots,
    SwiGLU,
    TokenChoice,
    aux_loss,
    moe_layers,
    record,
)


def exact(layer: MoE) -> MoE:
    """A gate of small whole numbers: with tokens of small whole numbers its logits are exact in any order."""
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.randint(-2, 3, layer.router.gate.weight.shape))
    return layer


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).double()


def naive(layer: MoE, x: Tensor) -> Tensor:
    """Compute the definition, token by token: top-k of the logits, softmax of the chosen, the sum over experts."""
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


@pytest.mark.parametrize(
    "backend, top_k, expert", pairwise(BACKENDS, [1, 2, 4], [FFN(10, bias=True), SwiGLU(10), GEGLU(10)]), ids=str
)
def test_layer_equals_its_definition_token_by_token(backend, top_k, expert):
    layer = MoEConfig(4, TokenChoice(top_k, init_scale=1.0), expert, backend=backend).build(6, out_dim=5)
    x = torch.randn(2, 7, 6)
    expected = naive(layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    # Every gradient, through the gates to the router too.
    inputs = list(layer.parameters())
    dy = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


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
    actual = []
    for each in (oracle, layer):
        token = x.clone().requires_grad_()
        with record(each) as tape:
            y = each(token, valid)
        ((y * dy).sum() + aux_loss(tape)).backward()
        actual.append((y, token.grad, *(p.grad for p in each.parameters())))
    for expected, tensor in zip(*actual, strict=True):
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
    torch.testing.assert_close(y, layer(x) + shared(x, "dense"))
    assert shared(x, "dense").abs().max() > 0


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
    actual = {}
    for name, tokens, context in (("alone", real, None), ("padded", x, RoutingContext(valid_BS=valid))):
        token = tokens.clone().requires_grad_()
        layer.zero_grad()
        with record(layer) as tape:
            y = layer(token, context)
        loss = aux_loss(tape)
        (y.square().sum() + loss).backward()
        actual[name] = (y, loss, token.grad, [p.grad.clone() for p in layer.parameters()])
    (y0, loss0, dx0, grads0), (y, loss, dx, grads) = actual["alone"], actual["padded"]
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


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("mixed", [False, True])
def test_padding_is_not_in_the_statistics_of_shared_experts(backend, mixed):
    shared = MLP((8,), norm="batch")
    options = {"shared_expert": Mixed((shared, shared), (1, 1)) if mixed else shared, "num_shared_experts": 2}
    padded = MoEConfig(4, backend=backend, **options).build(8)
    alone, x = copy.deepcopy(padded), torch.randn(2, 6, 8)
    valid = torch.arange(6) < torch.tensor([[4], [4]])
    actual, expected = padded(x, RoutingContext(valid_BS=valid)), alone(x[:, :4])
    torch.testing.assert_close(actual[:, :4], expected, rtol=1e-5, atol=1e-6)
    for kept, other in zip(padded.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(kept, other, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("width", [0, 6, 10])
@pytest.mark.parametrize(
    "config, context",
    [
        (MoEConfig(4), None),
        # A gate without weights: it is the experts' products that would pad or cut theirs.
        (MoEConfig(4, Hash(vocab_size=9), MLP((8,))), RoutingContext(token_ids_BS=torch.arange(6).view(2, 3))),
        (MoEConfig(4, Hash(vocab_size=9), backend="grouped"), RoutingContext(token_ids_BS=torch.arange(6).view(2, 3))),
        (MoEConfig(4, SoftSlots(), balance=Balance(0, 0)), None),
        (MoEConfig(4, Merge("smear"), balance=Balance(0, 0)), None),
    ],
    ids=["top-2", "mlp", "grouped", "soft", "merged"],
)
def test_tokens_of_another_width_are_refused(config, context, width):
    with pytest.raises(ValueError, match=f"x has width {width}, the layer is for dim=8"):
        config.build(8)(torch.zeros(2, 3, width), context)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "router",
    [
        TokenChoice(2),
        TokenChoice(2, noise="learned", jitter_eps=0.1, second_expert_policy="random", expert_bias=True),
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
    router = TokenChoice(2, noise="fixed", jitter_eps=0.1, second_expert_policy="random")
    layer = MoEConfig(4, router, capacity_factor=0.5, priority="random").build(8)
    x = torch.randn(2, 16, 8)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_moe_layers_are_listed_by_name_in_module_order():
    net = Net()
    assert list(moe_layers(net)) == ["blocks.0", "blocks.1"]
    assert list(moe_layers(net.blocks[0])) == [""]
    assert moe_layers(net.stem) == {}
