"""Losses, statistics, costs; the config and the state written and read again."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import replace

import torch

from ..config import MoEConfig
from ..contract import record
from ..flops import count_flops
from ..layers import aux_losses, update_expert_bias
from ..telemetry import RoutingStats
from .case import Case
from .check import Checks, hold

CHECKS = Checks()

# Losses and figures.


@CHECKS.keeps("the balance losses are finite, and each that applies is there")
def _(case: Case) -> None:
    layer = case.layer(training=True, balance=case.balance())
    with record(layer) as tape:
        layer(*case.padded())
    (entry,) = tape.entries
    hold(entry.terms >= case.router.balance_terms(), "the router does not know its balance terms")
    losses = aux_losses(tape)
    missing = case.router.balance_terms() - losses.terms.keys()
    hold(not missing, f"balance_terms() names what the routing does not allow: {', '.join(sorted(missing))}")
    for name, value in losses.terms.items():
        hold(value.isfinite(), f"{name} is {value}")
    hold(losses.total.isfinite(), f"the auxiliary loss is {losses.total}")
    update_expert_bias(layer, tape)
    update_expert_bias(layer, tape.detach())


@CHECKS.keeps("the tape tells loads, drops and entropies")
def _(case: Case) -> None:
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


# Costs, configuration, state.


@CHECKS.keeps("num_params is the sum of numel")
def _(case: Case) -> None:
    config = case.config(num_shared_experts=1)
    layer = config.build(case.dim)
    counted = sum(p.numel() for p in layer.parameters())
    hold(config.num_params(case.dim) == counted, f"num_params is {config.num_params(case.dim)}, counted {counted}")
    of_router = sum(p.numel() for p in layer.router.parameters())
    told = case.router.num_params(case.dim, case.num_experts)
    hold(told == of_router, f"num_params of the router is {told}, counted {of_router}")
    hold(0 < config.active_params(case.dim) <= counted, f"active_params is {config.active_params(case.dim)}")


@CHECKS.keeps("flops_per_token is what a counter counts")
def _(case: Case) -> None:
    B, S = 2, 8
    config, layer = case.config(), case.layer()
    x, context = case.tokens(B, S), case.context(B, S)
    counted = count_flops(layer, x, context)
    if not case.is_pairs:
        told = config.flops_per_token(case.dim, tokens_per_sequence=S)
        hold(told * B * S == counted, f"flops_per_token is {told}, counted {counted / (B * S)}")
        return
    rows = int(layer.router(x, context).tokens_per_expert_E.sum())
    expected = count_flops(layer.router, x, context) + rows * config.expert.flops_per_row(case.dim)
    hold(counted == expected, f"the layer costs {counted}, expected {expected}")
    counts = []
    for training in (False, True):
        router = case.layer(training=training).router
        # Of a token more: what is decided once a sequence costs a token nothing.
        longer, shorter = (count_flops(router, case.tokens(B, n), case.context(B, n)) for n in (2 * S, S))
        counts.append((longer - shorter) / (B * S))
    told = case.router.flops_per_token(case.dim, case.num_experts)
    hold(told in counts, f"flops_per_token is {told}, counted {counts[0]} in evaluation and {counts[1]} in training")


@CHECKS.keeps("the plain form of the config comes back equal")
def _(case: Case) -> None:
    config = case.config(balance=case.balance())
    plain = json.loads(json.dumps(config.to_dict()))
    hold(MoEConfig.from_dict(plain) == config, f"{MoEConfig.from_dict(plain)} is not {config}")


@CHECKS.keeps("saved, loaded, copied and pickled, a layer gives the same output")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.padded()
    expected = layer(x, context)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = replace(case, seed=case.seed + 1).layer()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies = {"loaded": loaded, "copied": copy.deepcopy(layer), "pickled": pickle.loads(pickle.dumps(layer))}
    for how, other in copies.items():
        hold(torch.equal(other(x, context), expected), f"a {how} layer gives another output")


@CHECKS.keeps("built on the meta device, emptied and reset, a layer starts as any other")
def _(case: Case) -> None:
    config = case.config(num_shared_experts=1)
    fresh = config.build(case.dim)
    with torch.device("meta"):
        layer = config.build(case.dim)
    layer.to_empty(device="cpu")
    expected = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    hold(found.keys() == expected.keys(), f"there are {sorted(found)}, expected {sorted(expected)}")
    with torch.no_grad():
        for value in found.values():
            value.fill_(77)  # what memory may hold
        for module in layer.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    parameters = dict(fresh.named_parameters())
    for name, value in found.items():
        start = expected[name].detach()
        if name in parameters and bool((start != start.flatten()[:1]).any()):  # drawn: of the same size
            largest, before = float(value.detach().abs().max()), float(start.abs().max())
            hold(largest <= 10 * before, f"{name} has {largest:.2g} where a new layer has {before:.2g} at most")
        else:
            hold(torch.equal(value, start), f"{name} is not as in a new layer")
