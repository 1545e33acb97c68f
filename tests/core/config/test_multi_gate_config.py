"""Configs of multi-task layers: plain form, costs, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from gated import ALL, DOMAIN, DOMAINS, TASKS, D, build, context, examples

import core
from core import MLP, PLE, SMES, STAR, Balance, HoME, M3oE, MMoE, RoutingContext, TokenChoice, count_flops

LEARNED = [  # their cost depends on how far the tasks' choices agree, or on the scores
    *("top-k", "top-k of FFN", "top-1, batch norm", "dselect-k", "expert choice", "threshold", "null experts", "relu"),
    *("shared dselect-k", "smes", "smes of FFN"),
]
FIXED = [name for name in ALL if name not in (*LEARNED, "sparse rank mixer")]


# Costs.


@pytest.mark.parametrize("name", ALL)
def test_parameters_equal_the_formulas_and_a_config_is_plain_dicts_and_back(name):
    config, domains = ALL[name], DOMAINS if name in DOMAIN else 0
    plain = json.loads(json.dumps(config.to_dict()))
    assert (plain["class_path"], core.MultiGateConfig.from_dict(plain)) == (f"core.{type(config).__name__}", config)
    assert type(config).from_dict(plain["init_args"]) == config
    for num_tasks in (1, 3):
        if isinstance(own := getattr(ALL[name], "num_task_experts", 0), tuple):
            config = replace(config, num_task_experts=own[-num_tasks:])
        if categories := getattr(ALL[name], "categories", ()):
            config = replace(config, categories=(0,) if num_tasks == 1 else categories)
        layer = config.build(D, num_tasks, domains)
        assert sum(p.numel() for p in layer.parameters()) == config.num_params(D, num_tasks, domains)
        assert core.active_params(layer) == config.active_params(D, num_tasks, domains)


@pytest.mark.parametrize("name", FIXED)
def test_counted_flops_equal_the_formula(name):
    config, domains = ALL[name], DOMAINS if name in DOMAIN else 0
    counted = count_flops(build(name).eval(), examples(16), context(name, 16))
    assert counted == 16 * config.flops_per_token(D, TASKS, domains, batch_size=16)


@pytest.mark.parametrize("name", LEARNED)
def test_each_chosen_row_is_computed_and_counted_once(name):
    config, layer, x = ALL[name], build(name).eval(), examples(16)
    with core.record(layer) as tape:
        layer(x)
    routings = [e.routing for e in tape.entries if not isinstance(e.routing, core.DenseRouting)]
    pairs = {p for r in routings for p in zip(r.token_index_N.tolist(), r.expert_ids_N.tolist(), strict=True)}
    rows = sum(expert < 8 for _, expert in pairs)
    if name == "smes of FFN":  # a hidden layer of 5
        gates = 2 * TASKS * (D * 5 + 5 * 8)
    elif isinstance(config, SMES):
        gates = 2 * TASKS * D * 8
    else:
        gates = len(routings) * config.router.flops_per_token(D, 8)
        gates += 2 * TASKS * D * 8 if config.selection == "shared" else 0
    assert 0 < rows <= sum(int(r.tokens_per_expert_E.sum()) for r in routings)
    assert count_flops(layer, x) == 16 * gates + rows * config.expert.flops_per_row(D)


def test_costs_by_hand():
    # MMoE, D=9, 3 tasks, 5 experts of 9 -> 7 -> 6. Parameters: experts 5 * (9 * 7 + 7 + 7 * 6 + 6) = 590, gates 135.
    # FLOPs: experts 2 * 5 * (63 + 42) = 1050, gates 2 * 135 = 270, weighted sums 2 * 3 * 5 * 6 = 180.
    mmoe = ALL["mmoe"]
    assert mmoe.num_params(9, 3) == mmoe.active_params(9, 3) == 725
    assert mmoe.flops_per_token(9, 3) == 1500
    # CGC: 3 shared and 2 for each of 3 tasks: 9 experts of 9 * 6 + 6, three gates over 5.
    cgc = ALL["cgc"]
    assert (cgc.num_params(9, 3), cgc.flops_per_token(9, 3)) == (9 * 60 + 3 * 5 * 9, 2 * (9 * 54 + 15 * 9 + 15 * 6))
    # CGC of 2, 0 and 1 own experts: 6 experts of 60, gates over 5, 3 and 4.
    uneven = ALL["uneven cgc"]
    assert uneven.num_params(9, 3) == uneven.active_params(9, 3) == 6 * 60 + 12 * 9
    assert uneven.flops_per_token(9, 3) == 2 * (6 * 54 + 12 * 9 + 12 * 6)
    # Sparse: 8 experts of 60; each of 3 tasks routes (2 * 9 * 8) and takes 2 experts of 2 * 54. By chance an expert is
    # missed by all tasks with probability (3/4)^3, so that 4.625 of 8 are taken.
    sparse = ALL["top-k"]
    assert (sparse.num_params(9, 3), sparse.active_params(9, 3)) == (8 * 60 + 3 * 72, round(4.625 * 60) + 3 * 72)
    assert sparse.flops_per_token(9, 3) == 3 * 144 + round(4.625 * 108)
    # Gates that scale the input: no row is shared.
    assert ALL["input gates"].flops_per_token(9, 3) == 3 * (144 + 2 * 108)
    # SMES: 2 for all and one for each task, at most 5 of 8.
    smes = ALL["smes"]
    assert (smes.num_params(9, 3), smes.active_params(9, 3)) == (8 * 60 + 3 * 72, 5 * 60 + 3 * 72)
    assert (smes.flops_per_token(9, 3), smes.most_experts(9)) == (3 * 144 + 5 * 108, 8)
    # One selection for all: one route, 3 rows, and three gates of 2 * 9 * 8.
    assert ALL["shared top-k"].flops_per_token(9, 3) == 144 + 3 * 108 + 3 * 144
    # Two of each domain's experts (of 4 domains) beside 3: 11 experts held, 5 taken; gates over 5 and 4 vectors.
    domain = ALL["domain mmoe"]
    assert domain.num_params(9, 3, 4) == 11 * 60 + 3 * 5 * 9 + 4 * 9
    assert domain.active_params(9, 3, 4) == 5 * 60 + 3 * 5 * 9 + 4 * 9
    # E=64 of 16, K=4, D=128: dense 64 rows of 4096 FLOPs; each task 4 rows and a gate of 2 * 128 * 64.
    dense, sparse = MMoE(64), MMoE(64, router=TokenChoice(4))
    assert dense.flops_per_token(128, 2) == 64 * 4096 + 2 * 2 * 64 * (128 + 16)
    # Two tasks take 64 (1 - (15/16)^2) = 7.75 experts on average.
    assert sparse.flops_per_token(128, 2) == 7.75 * 4096 + 2 * 2 * 128 * 64


# Bad input.


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: core.MultiGateConfig.from_dict({"class_path": "core.TokenChoice"}), "is no MultiGateConfig"),
        (lambda: PLE.from_dict(MMoE().to_dict()), r"core\.MMoE' is no PLE"),
        (lambda: MMoE(4, MLP((6,)), core.Hash(10)).build(D, 2)(examples(3)), "token_ids_BS"),
        (lambda: core.CGC.from_dict({"router": None}), "CGC has no field 'router'"),
        (lambda: PLE(2, num_task_experts=[1, 2]).build(D, 3), r"num_task_experts=\[1, 2\] has 2 numbers for 3 tasks"),
        (lambda: MMoE(selection="shared"), "selection='shared' needs a router"),
        (lambda: MMoE(4, router=TokenChoice(9)), "top_k=9 exceeds num_experts=4"),
        (lambda: MMoE(4, router=core.SoftSlots()), "SoftSlots .* mixes: not for MMoE"),
        (lambda: MMoE(4, router=core.Merge()), "Merge.* mixes: not for MMoE"),
        (lambda: MMoE(4, router=TokenChoice(2), feature_gate=2), "feature_gate=2 does not apply with a router"),
        (lambda: MMoE(4, router=TokenChoice(2), expert_dropout=0.1), "expert_dropout=0.1 does not apply"),
        (lambda: MMoE(4, router=TokenChoice(2, gates_on="input"), selection="shared"), "gates_on='input'"),
        (lambda: MMoE(4, balance=Balance(load_balancing_loss=0.5)), "load_balancing_loss=0.5 does not apply to MMoE"),
        (lambda: MMoE(4, router=TokenChoice(2), balance=Balance(adaptive=True)), "adaptive=True"),
        (lambda: SMES(4, shared_top_k=3, private_top_k=2), r"shared_top_k \+ private_top_k=5 exceeds num_experts=4"),
        (lambda: SMES(4, shared_top_k=0, private_top_k=0), r"shared_top_k \+ private_top_k=0 is not at least 1"),
        (lambda: SMES(4, self_gate=1), "self_gate=1 does not apply to SMES"),
        (lambda: SMES(4, balance=Balance(router_z_loss=0.5)), "router_z_loss=0.5 does not apply to SMES"),
        (lambda: MMoE(4).build(D, 0), "num_tasks=0 is not at least 1"),
        (lambda: MMoE(4).build(0, 1), "dim=0 is not at least 1"),
        (lambda: MMoE(4).build(D, 1, -1), "num_domains=-1 is not at least 0"),
        (lambda: MMoE(4, num_domain_experts=1).build(D, 2), "num_domain_experts=1 needs num_domains"),
        (lambda: MMoE(4, num_domain_experts=1).num_params(D, 2), "num_domain_experts=1 needs num_domains"),
        (lambda: HoME(categories=(0, 2)), r"categories=\[0, 2\] must count from 0 without a gap"),
        (lambda: HoME(categories=(0, 1)).build(D, 3), r"categories=\[0, 1\] has 2 numbers for 3 tasks"),
        (lambda: HoME(num_domain_experts=1), "num_domain_experts=1 has no meaning for HoME"),
        (lambda: M3oE(self_gate=1), "self_gate=1 has no meaning for M3oE"),
        (lambda: M3oE().build(D, 2), "M3oE needs num_domains, which is 0"),
        (lambda: M3oE(balance=Balance(router_z_loss=0.1)), "router_z_loss"),
        (lambda: STAR().num_params(D, 2), "STAR needs num_domains, which is 0"),
        (lambda: STAR(3), "num_experts=3: STAR has one network a domain"),
        (lambda: STAR(expert=core.FFN(8)), "expert=FFN: STAR multiplies the layers of an MLP"),
        (lambda: STAR(expert_dropout=0.1), "expert_dropout=0.1 has no meaning for STAR, which has no gates"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "known, message",
    [
        (None, "needs context.domain_ids_B, which is None"),
        (RoutingContext(), "needs context.domain_ids_B, which is None"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1])), r"shape \(2,\)"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1, 4])), r"holds 4, which is not in range\(4\)"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1, -1])), "holds -1"),
        (RoutingContext(valid_BS=torch.ones(2, dtype=torch.bool)), r"valid_BS has shape \(2,\)"),
        (RoutingContext(valid_BS=torch.ones(3)), "it must be bool"),
    ],
)
@pytest.mark.parametrize(
    "config", [MMoE(3, MLP((6,)), num_domain_experts=1), MMoE(3, MLP((6,)), TokenChoice(2))], ids=str
)
def test_a_bad_context_is_refused(config, known, message):
    layer = config.build(D, TASKS, DOMAINS)
    with pytest.raises(ValueError, match=message):
        layer(examples(3), known)


@pytest.mark.parametrize(
    "config",
    [MMoE(3), PLE(2), MMoE(3, MLP((6,)), core.Hash(9)), MMoE(3, MLP((6,)), TokenChoice(2), "shared")],
    ids=["gates", "levels", "router a task", "selection"],
)
def test_examples_of_another_width_are_refused(config):
    ids = RoutingContext(token_ids_BS=torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"x has width {D + 1}, the layer is for dim={D}"):
        config.build(D, TASKS)(torch.zeros(3, D + 1), ids)


@pytest.mark.parametrize("selection", ["task", "shared"])
def test_one_backend_chooses_sorts_and_computes(selection):
    layer = MMoE(4, MLP((6,)), TokenChoice(2), selection, backend="eager").build(D, 2)
    assert layer.dispatcher.backend == layer.router[0].backend == layer.experts.backend == "eager"
