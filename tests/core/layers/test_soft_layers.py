"""Soft and merged layers as layers: tape, costs, dtypes, compilers, copies, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from softened import LORY, ROUTERS, build
from stepped import assert_exports, assert_same, step
from torch import Tensor, nn

import core
from core.routing.soft.soft import Merge, SoftSlots

# --- the tape, losses and statistics ---


def test_losses_bias_updates_and_statistics_pass_over_soft_layers_beside_others():
    model = nn.Sequential(
        core.MoEConfig(4, core.TokenChoice(2, expert_bias=True), core.FFN(12)).build(8),
        build(SoftSlots(2)),
        build(Merge("meo")),
        build(LORY),
    )
    x = torch.randn(2, 7, 8)
    with core.record(model) as tape:
        model(x)
    routing = tape.entries[3].routing  # scores are the weights of each token's group
    weights = routing.weights_GE.unflatten(0, (2, 3))
    assert torch.equal(routing.evidence.scores_TE, weights[:, torch.arange(7) // 3].flatten(0, 1))
    losses = core.aux_losses(tape)
    alone = copy.deepcopy(model[0])
    with core.record(alone) as first:
        alone(x)
    torch.testing.assert_close(losses.total, core.aux_loss(first))
    losses.total.backward()
    core.update_expert_bias(model, tape)
    assert model[0].router.expert_bias.abs().max() > 0
    detached = tape.detach()
    for entry in detached.entries:
        assert not any(t.requires_grad for t in vars(entry.routing).values() if isinstance(t, Tensor))
        assert not entry.routing.evidence.scores_TE.requires_grad
    stats = core.RoutingStats.from_tape(tape.merge(detached)).layers
    assert list(stats) == list(core.moe_layers(model)) == ["0", "1", "2", "3"]
    # Slots: 2 of each expert for both sequences, twice. Merged: 14 tokens twice, of two experts of four, or of all.
    assert stats["1"].tokens_per_expert.tolist() == [8] * 4
    assert int(stats["2"].chosen_per_expert.sum()) == 2 * 14 * 2
    assert stats["3"].chosen_per_expert.tolist() == [28] * 4
    for name in ("1", "2", "3"):
        assert int(stats[name].num_tokens) == 28
        assert stats[name].drop_rate == 0.0
    assert stats["1"].load_imbalance == 1.0
    assert 0 < stats["1"].entropy < 1
    assert stats["2"].entropy <= 0.5 + 1e-6  # of two experts of four: at most log 2 / log 4


@pytest.mark.parametrize("router", [SoftSlots(), Merge()], ids=str)
def test_a_balance_term_set_by_hand_and_flops_without_a_length_are_refused(router):
    for term in ("load_balancing_loss", "router_z_loss", "importance", "load"):
        with pytest.raises(ValueError, match=rf"balance.{term}=0.5 does not apply to {type(router).__name__}"):
            core.MoEConfig(4, router, balance=core.Balance(**{term: 0.5}))
    with pytest.raises(ValueError, match=r"depend on the length of the sequences: give tokens_per_sequence"):
        core.MoEConfig(4, router).flops_per_token(8)
    with pytest.raises(ValueError, match=r"tokens_per_sequence=0 is not at least 1"):
        core.MoEConfig(4, router).flops_per_token(8, tokens_per_sequence=0)
    # Who does not need it ignores it.
    assert core.MoEConfig(4).flops_per_token(8, tokens_per_sequence=5) == core.MoEConfig(4).flops_per_token(8)


# --- costs ---


@pytest.mark.parametrize("router", [*ROUTERS, SoftSlots(3), Merge("meo", top_k=3)], ids=str)
@pytest.mark.parametrize(
    "config, out_dim, shared", [(core.FFN(12, "relu", bias=True), None, 0), (core.SwiGLU(12), 5, 1)], ids=str
)
def test_parameters_and_flops_equal_numel_and_the_counter(router, config, out_dim, shared):
    moe = core.MoEConfig(4, router, config, num_shared_experts=shared)
    layer = moe.build(8, out_dim)
    assert moe.num_params(8, out_dim) == sum(p.numel() for p in layer.parameters())
    assert moe.active_params(8, out_dim) == core.active_params(layer)
    for length in (6, 7):
        # A whole number a token: up to half a FLOP of each is rounded.
        counted = core.count_flops(layer, torch.randn(3, length, 8))
        formula = moe.flops_per_token(8, out_dim, tokens_per_sequence=length)
        assert abs(counted - 3 * length * formula) <= 3 * length / 2


def test_soft_slots_cost_by_hand():
    # Four experts of 2 * 8 * 12 = 192 parameters, 384 FLOPs a row; two slots each, 16 tokens: 8 / 16 rows a token.
    # Logits 2 * 8 * 8, slots 2 * 8 * 8, tokens from slots 2 * 8 * 8: 384.
    moe = core.MoEConfig(4, SoftSlots(2), core.FFN(12))
    assert moe.flops_per_token(8, tokens_per_sequence=16) == 384 + 192
    # phi 4 * 2 * 8 and a scale; every token is in every slot: all are active.
    assert moe.num_params(8) == moe.active_params(8) == 65 + 4 * 192


def test_merge_cost_by_hand():
    # One expert a token, 384; a sequence of 16: gate 2 * 8 * 4 = 64, merging 2 * 4 * 192 = 1536, 100 a token.
    assert core.MoEConfig(4, Merge("smear"), core.FFN(12)).flops_per_token(8, tokens_per_sequence=16) == 384 + 100
    # Segments of 8: twice the merging.
    lory = core.MoEConfig(4, Merge("lory", segment_length=8), core.FFN(12))
    assert lory.flops_per_token(8, tokens_per_sequence=16) == 384 + 200
    # Segments of 12 fill 16 tokens up to 24: 24 rows.
    lory = core.MoEConfig(4, Merge("lory", segment_length=12), core.FFN(12))
    assert lory.flops_per_token(8, tokens_per_sequence=16) == 384 * 24 // 16 + 200
    # A token goes through one expert's worth of parameters.
    assert lory.active_params(8) == 32 + 192


# --- compile, export, copies ---


# The conformance suite compiles and exports every router; here are a backward and a single segment of any size.
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("router", [SoftSlots(2), LORY], ids=str)
def test_a_compiled_layer_trains_as_the_plain_one_at_other_numbers_of_tokens(router):
    layer = build(router)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 9, 8), (2, 12, 8)):
        x = torch.randn(shape)
        assert_same(step(layer, x, run=compiled), step(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "least"), [pytest.param(SoftSlots(2), 1, marks=pytest.mark.slow), (LORY, 4)], ids=str
)
def test_exports_with_other_numbers_of_tokens(router, least):
    # A program of one segment alone differs from one of several: segments have 3 tokens.
    layer = build(router, num_shared_experts=1).eval()
    assert_exports(layer, 8, length=7, least=least, rtol=1e-4, atol=1e-5)


def test_state_dict_has_the_documented_names_and_shapes():
    soft = core.MoEConfig(4, SoftSlots(3), core.FFN(12)).build(8)
    experts = {"experts.w_in": (4, 8, 12), "experts.w_out": (4, 12, 8)}
    assert {n: tuple(t.shape) for n, t in soft.state_dict().items()} == {
        "router.phi": (4, 3, 8),
        "router.scale": (1,),
        **experts,
    }
    merged = core.MoEConfig(4, Merge(), core.FFN(12)).build(8)
    assert {n: tuple(t.shape) for n, t in merged.state_dict().items()} == {"router.gate.weight": (4, 8), **experts}
    cosine = core.MoEConfig(4, core.Cosine(), core.FFN(12)).build(8)
    for layer, name in ((soft, "router.scale"), (cosine, "router.gate.log_scale")):  # a number of an older checkpoint
        layer.load_state_dict({**layer.state_dict(), name: torch.tensor(0.25)})
        assert layer.get_parameter(name).tolist() == [0.25]


# --- what is refused ---


@pytest.mark.parametrize("router", [SoftSlots(), Merge()], ids=str)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity_factor": 1.25}, r"capacity_factor=1.25 does not apply to {}\b"),
        ({"eval_capacity_factor": 1.25}, r"eval_capacity_factor=1.25 does not apply to {}\b"),
        ({"priority": "score"}, r"priority='score' does not apply to {}\b"),
        ({"group": "batch"}, r"group='batch' would mix a sequence with its neighbors: {} takes 'sequence' alone"),
        ({"group": 16}, r"group=16 would mix a sequence with its neighbors: {} takes 'sequence' alone"),
    ],
)
def test_options_of_sparse_layers_are_refused_in_one_line(router, options, message):
    with pytest.raises(ValueError, match=message.format(type(router).__name__)) as error:
        core.MoEConfig(4, router, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"backend='cpu' does not apply to Merge"):
        core.MoEConfig(4, Merge(), backend="cpu")
    soft = replace(core.MoEConfig(4, SoftSlots()), backend="cpu", group="sequence")
    assert soft.build(8).experts.backend == "cpu"


@pytest.mark.parametrize(
    "arguments, num_experts, message",
    [
        ({"top_k": 2}, 4, r"top_k=2 is an option of kind='meo', not of 'smear'"),
        ({"kind": "lory", "normalize": True}, 4, r"normalize=True is an option of kind='meo', not of 'lory'"),
        ({"segment_length": 4}, 4, r"segment_length=4 is an option of kind='lory', not of 'smear'"),
        ({"kind": "meo", "first": "own"}, 4, r"first='own' is an option of kind='lory', not of 'meo'"),
        ({"kind": "lory", "expert_dropout": 0.1}, 4, r"expert_dropout=0.1 is an option of kind='smear', not of 'lory'"),
        ({"kind": "meo", "top_k": 1, "normalize": True}, 4, r"normalize=True with top_k=1 .* no gradient"),
        ({"kind": "meo", "top_k": 5}, 4, r"top_k=5 exceeds num_experts=4"),
        ({"kind": "meo"}, 1, r"top_k=2 exceeds num_experts=1"),
    ],
)
def test_a_wrong_option_of_merge_is_refused_with_its_value_and_the_rule(arguments, num_experts, message):
    with pytest.raises(ValueError, match=message):
        core.MoEConfig(num_experts, Merge(**arguments))
