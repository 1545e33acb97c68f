"""Checks of layers of any router and of any experts: saved, compiled, by every backend, and without chance."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from dataclasses import replace
from typing import Any

import torch

from ..config import MoEConfig
from .check import Checks, hold, same_step, step
from .expert_case import ExpertCase
from .router_case import RouterCase

CHECKS: Checks[RouterCase | ExpertCase] = Checks()


@CHECKS.keeps("the plain form of the config comes back equal")
def _(case: RouterCase | ExpertCase) -> None:
    config = case.config(balance=case.balance())
    plain = json.loads(json.dumps(config.to_dict()))
    hold(MoEConfig.from_dict(plain) == config, f"{MoEConfig.from_dict(plain)} is not {config}")


@CHECKS.keeps("saved, loaded, copied and pickled, a layer gives the same output")
def _(case: RouterCase | ExpertCase) -> None:
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
def _(case: RouterCase | ExpertCase) -> None:
    config = case.full_config()
    fresh = config.build(case.dim)
    with torch.device("meta"):
        layer = config.build(case.dim)
    layer.to_empty(device="cpu")
    expected = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    hold(state.keys() == expected.keys(), f"there are {sorted(state)}, expected {sorted(expected)}")
    with torch.no_grad():
        for value in state.values():
            value.fill_(77)  # what memory may hold
        for module in layer.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    parameters = dict(fresh.named_parameters())
    for name, value in state.items():
        start = expected[name].detach()
        if name in parameters and bool((start != start.flatten()[:1]).any()):  # sampled: of the same size
            largest, before = float(value.detach().abs().max()), float(start.abs().max())
            hold(largest <= 10 * before, f"{name} has {largest:.2g} where a new layer has {before:.2g} at most")
        else:
            hold(torch.equal(value, start), f"{name} is not as in a new layer")


@CHECKS.keeps("every backend gives the oracle's output and gradients", lambda c: c.has("backend"))
def _(case: RouterCase | ExpertCase) -> None:
    for training, backend in itertools.product((False, True), ("cpu", "grouped")):
        options: dict[str, Any] = {"training": training, "balance": case.balance()}
        expected = step(case.layer(backend="eager", **options), *case.padded())
        try:
            same_step(step(case.layer(backend=backend, **options), *case.padded()), expected)
        except AssertionError as error:
            raise AssertionError(f"backend={backend!r}, training={training}: {error}") from None


@CHECKS.keeps("torch.compile goes through without a graph break, to the same step")
def _(case: RouterCase | ExpertCase) -> None:
    for training in (True, False):
        torch.compiler.reset()
        layer = case.layer(training=training, balance=case.balance())
        x, context = case.padded()
        expected = step(layer, x, context)
        try:
            same_step(step(layer, x, context, run=torch.compile(layer, backend="eager", fullgraph=True)), expected)
        finally:
            torch.compiler.reset()


@CHECKS.keeps("nothing is random in evaluation")
def _(case: RouterCase | ExpertCase) -> None:
    layer = case.layer()
    x, context = case.padded()
    before = torch.random.get_rng_state()
    first = layer(x, context)
    hold(torch.equal(torch.random.get_rng_state(), before), "a forward in evaluation draws random numbers")
    torch.manual_seed(case.seed + 1)
    hold(torch.equal(layer(x, context), first), "two forwards in evaluation differ")


@CHECKS.keeps("the same seed gives the same training step")
def _(case: RouterCase | ExpertCase) -> None:
    layer = case.layer(training=True, balance=case.balance())
    first, second = (step(layer, *case.padded()) for _ in range(2))
    for name, value in first.items():
        hold(torch.equal(second[name], value), f"{name} differs")
