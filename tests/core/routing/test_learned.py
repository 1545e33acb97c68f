"""Cosine, attention and two-stage gates on typed weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from routed import ids, recorded
from stepped import assert_same, step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from core import FFN, Balance, MoEConfig, RoutingContext, aux_loss, record
from core.layers import aux_losses
from core.routing.learned import Attention, Cosine, Stable


def context(B: int, S: int, vocab_size: int = 10, **fields: Tensor) -> RoutingContext:
    return RoutingContext(token_ids_BS=torch.randint(vocab_size, (B, S)), **fields)


def cosine(projection: Tensor, experts: Tensor, **options) -> nn.Module:
    built = Cosine(proj_dim=projection.shape[0], **options).build(projection.shape[1], len(experts)).eval()
    built.gate.projection.data.copy_(projection)
    built.gate.weight.data.copy_(experts)
    return built


def test_cosine_logits_are_projected_cosines_over_the_temperature():
    # Token (5, 0) against (3, 4) of length 5: 15 / 25 = 0.6; against (0, 2): 0; over 0.5: 1.2 and 0.
    built = cosine(torch.eye(2), torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    routing = built(torch.tensor([[[5.0, 0.0]]]))
    assert (routing.evidence.logits_TE.tolist(), ids(routing)) == ([[pytest.approx(0.0), pytest.approx(1.2)]], [[1, 0]])
    # 1 / (1 + e^-1.2) = 1 / 1.301194 = 0.768525.
    assert routing.gates_N.tolist() == pytest.approx([0.768525, 0.231475], abs=1e-6)
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.231475, 0.768525], abs=1e-6)
    # (1, 2, 2) -> (2 + 2, 1 + 2) = (4, 3); against (1, 0): 0.8, against (0, 1): 0.6; over 0.2: 4 and 3.
    projection = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    built = cosine(projection, torch.eye(2), temperature=0.2)
    assert built(torch.tensor([[[1.0, 2.0, 2.0]]])).evidence.logits_TE[0].tolist() == pytest.approx([4.0, 3.0])
    # The length of tokens and embeddings does not count.
    experts, x, projection = torch.randn(4, 3), torch.randn(2, 5, 6), torch.randn(3, 6)
    plain = cosine(projection, experts)(x)
    scaled = cosine(projection, experts * torch.tensor([[1.0], [0.1], [10.0], [3.0]]))(x * 7)
    torch.testing.assert_close(scaled.evidence.logits_TE, plain.evidence.logits_TE)


def test_the_temperature_is_learned_the_space_never_a_line_and_a_zero_token_has_zero_cosines():
    built = cosine(torch.eye(2), torch.eye(2))
    built(torch.tensor([[[1.0, 0.0]]])).evidence.logits_TE[0, 0].backward()
    assert built.gate.log_scale.grad.item() == pytest.approx(2.0)  # d exp(s) / ds = exp(s) = 1 / 0.5
    built.gate.log_scale.data.fill_(9.0)
    assert built(torch.tensor([[[1.0, 0.0]]])).evidence.logits_TE[0, 0].item() == pytest.approx(100.0)
    assert ([Cosine().space(E) for E in (2, 4, 6, 64)], Cosine(proj_dim=256).space(8)) == ([2, 2, 3, 32], 256)
    built, x = Cosine(proj_dim=2).build(3, 4), torch.zeros(1, 2, 3, requires_grad=True)
    routing = built(x)
    assert routing.evidence.logits_TE.abs().max() == 0
    routing.gates_N.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in built.parameters())


def attention_logits(query: list[float], key: list[float], value: list[float]) -> list[float]:
    """Return the logits of one token, expert by expert."""
    logits = []
    for q in query:
        weights = [math.exp(q * k) for k in key]
        logits.append(sum(w * v for w, v in zip(weights, value, strict=True)) / sum(weights))
    return logits


def test_attention_logits_by_hand():
    built = Attention().build(3, 2).eval()
    with torch.no_grad():
        # A token of ones along its three axes picks q = (1, 0), k = (log 2, 0), v = (1, 4).
        built.gate.weight.copy_(torch.tensor([[[1.0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0] * 3], [[0, 0, 1], [0, 0, 4]]]))
    routing = built(torch.tensor([[[1.0, math.log(2), 1.0]]]))
    # Expert 0: weights exp(1 log 2), exp(0) -> 2/3, 1/3: 2/3 + 4/3 = 2. Expert 1: 1/2, 1/2: 2.5.
    assert (routing.evidence.logits_TE[0].tolist(), ids(routing)) == (pytest.approx([2.0, 2.5]), [[1, 0]])
    # Softmax of the chosen logits: 1 / (1 + e^-0.5) = 0.622459.
    assert routing.gates_N.tolist() == pytest.approx([0.622459, 0.377541], abs=1e-6)
    # Of any weights it is the equation.
    built, x = Attention(top_k=1).build(4, 5).eval(), torch.randn(1, 6, 4)
    query, key, value = (F.linear(x[0], w).tolist() for w in built.gate.weight)
    expected = [attention_logits(*row) for row in zip(query, key, value, strict=True)]
    torch.testing.assert_close(built(x).evidence.logits_TE, torch.tensor(expected))


def stable(training: bool = True, **options):
    """D = E = 2, logits are the input; the light router's logits of id i are (i, 1)."""
    built = Stable(3, embedding_dim=2, **options).build(2, 2).train(training)
    with torch.no_grad():
        built.gate.weight.copy_(torch.eye(2))
        built.light.embedding.copy_(torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
        built.light.weight.copy_(torch.eye(2))
    return built


def test_the_best_expert_of_the_hidden_state_and_then_of_the_light_router_is_taken_at_the_gates_sigmoid():
    built, given = stable(False), RoutingContext(token_ids_BS=torch.tensor([[0, 2]]))
    x = torch.tensor([[[math.log(3), 0.0], [-1.0, 0.0]]])
    routing = built(x, given)
    assert ids(routing) == [[0], [1]]
    assert routing.gates_N.tolist() == pytest.approx([0.75, 0.5])  # 3 / (3 + 1) and 1 / 2
    assert routing.evidence.extra is None  # nothing is distilled in evaluation
    built.freeze_light_router()
    routing = built(x, given)
    assert ids(routing) == [[1], [0]]
    assert routing.gates_N.tolist() == pytest.approx([0.5, 1 / (1 + math.e)])  # sigmoid(0), sigmoid(-1)


def test_the_gate_learns_nothing_from_distillation_and_the_light_router_nothing_else():
    x, given, built = torch.randn(1, 8, 2), context(1, 8, 3), stable()
    built(x, given).evidence.extra["distillation"].sum().backward()
    assert built.gate.weight.grad is None
    assert built.light.embedding.grad.abs().max() > 0
    built.zero_grad()
    routing = built(x, given)
    evidence = routing.evidence
    rest = (routing.gates_N, evidence.logits_TE.logsumexp(-1), evidence.scores_TE.square())
    sum(tensor.sum() for tensor in rest).backward()
    assert built.light.embedding.grad is None
    assert built.gate.weight.grad.abs().max() > 0


def test_the_frozen_light_router_does_not_move_and_the_gate_does():
    layer = MoEConfig(4, Stable(10, 3), FFN(8)).build(6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    x, given = torch.randn(2, 5, 6), context(2, 5)

    def step() -> None:
        with record(layer) as tape:
            y = layer(x, given)
        (y.square().sum() + aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()

    light = [p.clone() for p in layer.router.light.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(light, layer.router.light.parameters(), strict=True))
    with record(layer) as tape:
        (layer(x, given).sum() + aux_loss(tape)).backward()
    layer.router.freeze_light_router()  # with gradients waiting
    light = [p.clone() for p in layer.router.light.parameters()]
    gate = layer.router.gate.weight.clone()
    step()
    assert all(torch.equal(a, b) for a, b in zip(light, layer.router.light.parameters(), strict=True))
    assert not torch.equal(gate, layer.router.gate.weight)


def test_distillation_joins_the_auxiliary_loss_of_stage_1_and_none_is_left_in_stage_2():
    layer = MoEConfig(4, Stable(10), FFN(8), balance=Balance(load_balancing_loss=1.0)).build(6)
    x, given = torch.randn(2, 5, 6), context(2, 5)
    tape = recorded(layer, x, given)
    assert set(aux_losses(tape).terms) == {"load_balancing_loss", "router_z_loss", "distillation"}
    layer.router.freeze_light_router()
    tape = recorded(layer, x, given)
    assert aux_losses(tape).terms == {}
    config = MoEConfig(
        2, Stable(3, 2, distillation=0.5), FFN(4), balance=Balance(load_balancing_loss=0, router_z_loss=0)
    )
    layer = config.build(2)
    layer.router.load_state_dict(stable().state_dict())
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, torch.nan]]])
    valid = torch.tensor([[True, True, True, False]])
    tape = recorded(layer, x, RoutingContext(valid_BS=valid, token_ids_BS=torch.tensor([[0, 1, 2, -100]])))
    losses = aux_losses(tape)
    # Targets 0, 0, 1; light logits (0, 1), (1, 1), (2, 1): log(1 + e), log 2, log(1 + e).
    given = tape.entries[0].routing.evidence.extra["distillation"]
    assert given[:3].tolist() == pytest.approx([1.313262, 0.693147, 1.313262], abs=1e-6)
    # (1.313262 + 0.693147 + 1.313262) / 3 = 1.106557, at weight 0.5.
    assert losses.terms["distillation"].item() == pytest.approx(1.106557, abs=1e-6)
    assert losses.total.item() == pytest.approx(0.553278, abs=1e-6)
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in layer.router.light.parameters())
    detached = tape.detach().entries[0].routing
    assert not detached.evidence.extra["distillation"].requires_grad


def test_the_light_router_learns_what_the_gate_does():
    built, vocab = Stable(20, 8).build(16, 4).train(), torch.randn(20, 16)
    optimizer, tokens = torch.optim.Adam(built.light.parameters(), lr=0.1), torch.arange(20)[None]
    given = RoutingContext(token_ids_BS=tokens)  # the hidden state is a function of the token
    for _ in range(50):
        built(vocab[tokens], given).evidence.extra["distillation"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = built(vocab[tokens], given).expert_ids_N
    assert len(learned.unique()) > 1
    built.freeze_light_router()
    first, second = (built(torch.randn(1, 20, 16), given) for _ in range(2))  # whatever the hidden states
    assert torch.equal(first.expert_ids_N, learned)
    assert torch.equal(second.expert_ids_N, learned)
    assert not torch.equal(first.gates_N, second.gates_N)


def test_the_stage_is_saved_loaded_and_copied():
    built, other = stable(False), Stable(3, embedding_dim=2).build(2, 2).eval()
    start = {name: value.clone() for name, value in built.state_dict().items()}
    built.freeze_light_router()
    other.load_state_dict(built.state_dict())
    x, given = torch.randn(2, 7, 2), context(2, 7, 3)
    assert torch.equal(other(x, given).expert_ids_N, built(x, given).expert_ids_N)
    assert other.terms == frozenset()
    assert not any(p.requires_grad for p in other.light.parameters())
    other.load_state_dict(start)
    assert torch.equal(other(x, given).expert_ids_N, other(x, given).evidence.logits_TE.argmax(-1))
    assert "distillation" in other.terms
    assert all(p.requires_grad for p in other.light.parameters())
    model, averaged = stable(), AveragedModel(stable())
    averaged.update_parameters(model)
    model.freeze_light_router()
    averaged.update_parameters(model)
    x, given = torch.tensor([[[-1.0, 0.0]]]), RoutingContext(token_ids_BS=torch.tensor([[2]]))
    # The hidden state takes expert 1, the light router's (2, 1) expert 0.
    assert (ids(stable()(x, given)), ids(averaged(x, given))) == ([[1]], [[0]])
    assert not any(p.requires_grad for p in averaged.module.light.parameters())
    averaged.module.reset_parameters()
    assert ids(averaged(x, given)) == [[1]]
    # A forward leaves a frozen router frozen.
    built = stable().requires_grad_(False)
    built(torch.randn(1, 2, 2), context(1, 2, 3))
    assert not any(p.requires_grad for p in built.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_stage_2_compiles_and_exports_as_stage_1_does_in_the_conformance_suite():
    layer = MoEConfig(4, Stable(10), FFN(8), balance=Balance(load_balancing_loss=1.0)).build(6)
    x, given = torch.randn(2, 5, 6), context(2, 5)
    layer.router.freeze_light_router()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(step(layer, x, given, compiled), step(layer, x, given))
    program = torch.export.export(layer.eval(), (x, given)).module()
    torch.testing.assert_close(program(x, given), layer(x, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Cosine(top_k=1, normalize=True), r"normalize=True with top_k=1 .* no gradient"),
        (lambda: Cosine(top_k=5).build(6, 4), r"top_k=5 exceeds num_experts=4"),
        (lambda: Attention(top_k=1, normalize=True), r"normalize=True with top_k=1"),
        (lambda: Attention(top_k=9).build(6, 8), r"top_k=9 exceeds num_experts=8"),
    ],
)
def test_a_wrong_option_is_refused_with_its_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
