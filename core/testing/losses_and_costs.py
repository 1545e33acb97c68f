"""Checks of balance losses, statistics of the experts' use, parameters and FLOPs."""

from __future__ import annotations

import torch

from ..contract import record
from ..flops import count_flops
from ..layers import aux_losses, update_expert_bias
from ..telemetry import RoutingStats
from .check import Checks, hold
from .router_case import RouterCase

CHECKS: Checks[RouterCase] = Checks()


@CHECKS.keeps("the balance losses are finite, and each that applies is there")
def _(case: RouterCase) -> None:
    layer = case.layer(training=True, balance=case.balance())
    with record(layer) as tape:
        layer(*case.padded())
    (entry,) = tape.entries
    hold(entry.terms >= case.router.terms, "the router does not know its balance terms")
    losses = aux_losses(tape)
    missing = case.router.terms - losses.terms.keys()
    hold(not missing, f"terms names what the routing does not allow: {', '.join(sorted(missing))}")
    for name, value in losses.terms.items():
        hold(value.isfinite(), f"{name} is {value}")
    hold(losses.total.isfinite(), f"the auxiliary loss is {losses.total}")
    update_expert_bias(layer, tape)
    update_expert_bias(layer, tape.detach())


@CHECKS.keeps("the tape tells loads, drops and entropies")
def _(case: RouterCase) -> None:
    for training in (False, True):
        layer = case.layer(training=training)
        x, context = case.padded()
        with record(layer) as tape, torch.no_grad():
            layer(x, context)
            layer(x, context)
        stats = RoutingStats.from_tape(tape).layers[""]
        hold(int(stats.num_tokens) == 20, f"2 * 10 real tokens are counted as {int(stats.num_tokens)}")
        figures = stats.figures()
        for name, low, high in (
            ("load_imbalance", 1.0, case.num_experts),
            ("entropy", 0.0, 1.0),
            ("load_entropy", 0.0, 1.0),
            ("drop_rate", 0.0, 1.0),
            ("dead_experts", 0, case.num_experts),
        ):
            hold(low - 1e-6 <= figures[name] <= high + 1e-6, f"{name} is {figures[name]}, not in [{low}, {high}]")


@CHECKS.keeps("num_params is the sum of numel")
def _(case: RouterCase) -> None:
    config = case.config(num_shared_experts=1)
    layer = config.build(case.dim)
    counted = sum(p.numel() for p in layer.parameters())
    hold(config.num_params(case.dim) == counted, f"num_params is {config.num_params(case.dim)}, counted {counted}")
    of_router = sum(p.numel() for p in layer.router.parameters())
    stated = case.router.num_params(case.dim, case.num_experts)
    hold(stated == of_router, f"num_params of the router is {stated}, counted {of_router}")
    hold(0 < config.active_params(case.dim) <= counted, f"active_params is {config.active_params(case.dim)}")


@CHECKS.keeps("flops_per_token is what a counter counts")
def _(case: RouterCase) -> None:
    B, S = 2, 8
    # A merge once per batch, as in the evaluation of an averaged layer, is not a cost per token.
    config, layer = case.config(), case.layer(training=case.router.layer_kind == "averaged")
    x, context = case.tokens(B, S), case.context(B, S)
    counted = count_flops(layer, x, context)
    if not case.is_pairs:
        stated = config.flops_per_token(case.dim, tokens_per_sequence=S)
        hold(stated * B * S == counted, f"flops_per_token is {stated}, counted {counted / (B * S)}")
        return
    rows = int(layer.router(x, context).tokens_per_expert_E.sum())
    expected = count_flops(layer.router, x, context) + rows * config.expert.flops_per_row(case.dim)
    hold(counted == expected, f"the layer costs {counted}, expected {expected}")
    counts = []
    for training in (False, True):
        router = case.layer(training=training).router
        # The difference is the cost of further tokens, without the cost of a decision made once per sequence.
        longer, shorter = (count_flops(router, case.tokens(B, n), case.context(B, n)) for n in (2 * S, S))
        counts.append((longer - shorter) / (B * S))
    stated = case.router.flops_per_token(case.dim, case.num_experts)
    hold(stated in counts, f"flops_per_token is {stated}, counted {counts[0]} in evaluation, {counts[1]} in training")
