"""Layers of categories and domains (HoME, M3oE, STAR) against loops over their papers' equations."""

from __future__ import annotations

import pytest
import torch
from gated import DOMAINS, TASKS, D, assert_same_with_gradients, build, context, examples, expert
from torch import Tensor

from core import MLP, STAR, HoME, M3oE, RoutingContext, record
from core.experts import StarExperts
from core.layers.scenarios import DomainNorm, shared_out

# HoME.


def mixed(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    return sum(weights[:, [i]] * output for i, output in enumerate(outputs))


def self_gated(logits: Tensor, outputs: list[Tensor]) -> Tensor:
    """Return the output of a self-gate: a sigmoid of one expert, a softmax of several."""
    return mixed(logits.sigmoid() if len(outputs) == 1 else logits.softmax(-1), outputs)


@pytest.mark.parametrize(
    "config",
    [
        HoME(2, MLP((7, 6)), 1, 1, (1, 0, 1)),
        HoME(2, num_category_experts=2, num_task_experts=2, categories=(1, 0, 1), self_gate=2, feature_gate=3),
    ],
    ids=["plain", "the paper's experts and feature gates"],
)
def test_home_equals_its_equations(config):
    # Tasks 0 and 2 are of category 1, task 1 of category 0.
    torch.manual_seed(0)
    layer, x = config.build(D, TASKS), examples(7).requires_grad_()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    S, C, K, L = config.num_experts, config.num_category_experts, config.num_task_experts, config.self_gate

    def outputs(level: int, first: int, count: int, v: Tensor) -> list[Tensor]:
        """Return what some experts of a level make of v, each after its feature gate."""
        seen = [v] * count
        if layer.feature_gates is not None:
            down, up = layer.feature_gates[level].down, layer.feature_gates[level].up
            seen = [v * 2 * (v @ down[e] @ up[e]).sigmoid() for e in range(first, first + count)]
        return [expert(layer.experts[level], first + i, h) for i, h in enumerate(seen)]

    # Meta experts: the shared ones, then of each category its own and those of its self-gate.
    meta, gates = layer.router[0], layer.router[1]
    common = outputs(0, 0, S, x)
    own = [outputs(0, S + c * (C + L), C + L, x) for c in range(2)]
    z = [
        mixed((x @ meta.weight[c].T).softmax(-1), common + own[c][:C])
        + self_gated(x @ meta.self_weight[c].T, own[c][C:])
        for c in range(2)
    ]
    shared = mixed((x @ meta.shared_weight.T).softmax(-1), common + own[0][:C] + own[1][:C])
    # Second level: shared; category 0, task 1; category 1, task 0, task 2; a task's own come before its self-gate's.
    common = outputs(1, 0, S, shared)
    of_category = [outputs(1, S, C, z[0]), outputs(1, S + C + K + L, C, z[1])]
    first = {1: S + C, 0: S + 2 * C + K + L, 2: S + 2 * C + 2 * (K + L)}
    expected = []
    for k, c in enumerate(config.categories):
        seen, own_k = torch.cat((shared, z[c]), -1), outputs(1, first[k], K + L, z[c])
        y_k = mixed((seen @ gates.weight[k].T).softmax(-1), common + of_category[c] + own_k[:K])
        expected.append(y_k + self_gated(seen @ gates.self_weight[k].T, own_k[K:]))
    assert_same_with_gradients(layer, x, layer(x), torch.stack(expected))


def test_the_gates_of_home_name_their_experts():
    with record(layer := build("home")) as tape:  # tasks 0 and 2 are of category 1
        layer(examples(4))
    of_categories = ("category0.0", "category0.1", "task1.0", "category1.0", "category1.1", "task0.0", "task2.0")
    assert layer.groups[1].all_names() == ("shared0", "shared1", *of_categories)
    experts = {entry.name: entry.routing.expert_names for entry in tape.entries}
    assert experts["level0.category1"] == ("shared0", "shared1", "category1.0", "category1.1")
    assert experts["level1.task2"] == ("shared0", "shared1", "category1.0", "category1.1", "task2.0")


# M3oE.


def test_m3oe_equals_its_equation():
    layer, x, known = build("m3oe"), examples(8), context("m3oe", 8)
    y, logits = layer(x, known), layer.fusion
    a_task, b_task, a_domain, b_domain = logits.sigmoid()
    # Experts: three shared, then one of each task, then one of each domain.
    for b, d in enumerate(known.domain_ids_B.tolist()):
        f = [expert(layer.experts, e, x[b]) for e in range(3 + TASKS + DOMAINS)]
        seen = x[b] + layer.router.domain.weight[d]
        other_domains = sum(f[3 + TASKS + i] for i in range(DOMAINS) if i != d) / (DOMAINS - 1)
        for k in range(TASKS):
            other_tasks = sum(f[3 + i] for i in range(TASKS) if i != k) / (TASKS - 1)
            gates = (layer.router.weight[k] @ seen).softmax(-1)
            expected = gates @ torch.stack(f[:3])
            expected = expected + a_task * (b_task * f[3 + k] + (1 - b_task) * other_tasks)
            expected = expected + a_domain * (b_domain * f[3 + TASKS + d] + (1 - b_domain) * other_domains)
            torch.testing.assert_close(y[k, b], expected, rtol=1e-5, atol=1e-5)


def test_the_tape_of_m3oe_has_every_experts_share():
    # Fusion weights start at 1/2: the shared experts have 1 of 1 + 1/2 + 1/2, so 1/2 of all.
    layer = M3oE(2, MLP((6,))).build(D, 2, 2)
    known = RoutingContext(domain_ids_B=torch.tensor([1, 0, 1]))
    with record(layer) as tape:
        layer(examples(3), known)
    assert [entry.name for entry in tape.entries] == ["task0", "task1"]
    routing = tape.entries[1].routing
    assert routing.expert_names == ("shared0", "shared1", "task0.0", "task1.0", "domain0.0", "domain1.0")
    gates = routing.gates_BtE[:, routing.gate]
    torch.testing.assert_close(gates[:, :2].sum(-1), torch.full((3,), 0.5))
    torch.testing.assert_close(gates[:, 2:], torch.full((3, 4), 0.125))  # a half of a half of the 1/2, over 2
    # 0.7 to its own; 0.3 in two equal parts.
    expected = torch.tensor([[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]])
    torch.testing.assert_close(shared_out(torch.tensor(0.7), 3), expected)
    assert shared_out(torch.tensor(0.7), 1).tolist() == [[1.0]]


# STAR.


@pytest.mark.parametrize("norm", [False, True])
def test_star_equals_its_equations(norm):
    torch.manual_seed(0)
    layer = STAR(1, MLP((7, 6)), norm=norm).build(D, TASKS, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x, domains = examples(9), torch.tensor([0, 2, 2, 0, 2, 2, 0, 2, 2])
    y = layer(x, RoutingContext(domain_ids_B=domains))
    own, centre = layer.experts, layer.experts.centre
    for d in (0, 2):
        h = x[domains == d]
        if norm:
            of = layer.norm
            h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
            h = (of.weight * of.domain_weight[d]) * h + of.bias + of.domain_bias[d]
        for i in range(2):
            w, b = getattr(own, f"w_{i}")[d] * centre[f"w_{i}"], getattr(own, f"b_{i}")[d] + centre[f"b_{i}"]
            h = (h @ w + b).relu()
        for k in range(TASKS):
            torch.testing.assert_close(y[k, domains == d], h, rtol=1e-4, atol=1e-5)


def test_star_starts_as_one_network_and_an_absent_domain_learns_nothing():
    layer = STAR(1, MLP((6,)), norm=False).build(D, 1, 3)
    x = examples(4)
    known, other = (RoutingContext(domain_ids_B=torch.tensor(ids)) for ids in ([0, 2, 2, 0], [1, 1, 0, 2]))
    torch.testing.assert_close(layer(x, known), layer(x, other))
    with record(layer) as tape:
        layer(x, known).sum().backward()
    (entry,) = tape.entries  # domains are the experts on the tape
    assert (entry.name, entry.terms, entry.routing.tokens_per_expert_E.tolist()) == ("", frozenset(), [2, 0, 2])
    assert layer.experts.w_0.grad.flatten(1).any(1).tolist() == [True, False, True]
    assert layer.experts.centre["w_0"].grad.any()


def test_domains_are_normalized_apart():
    # Domain 0 has 1 and 3: mean 2, variance 1. Domain 1 has 10 alone: no variance is known, so it is (10 - 0) / 1.
    norm = DomainNorm(2, 1)
    rows, domains = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1])
    torch.testing.assert_close(norm(rows, domains), torch.tensor([[-1.0], [1.0], [10.0]]), rtol=1e-4, atol=1e-4)
    # Momentum 0.1; the unbiased variance of 1 and 3 is 2: 0.9 + 0.2.
    torch.testing.assert_close(norm.running_mean, torch.tensor([[0.2], [0.0]]))
    torch.testing.assert_close(norm.running_var, torch.tensor([[1.1], [1.0]]))
    norm.eval()
    torch.testing.assert_close(norm(rows[:1], domains[:1]), torch.tensor([[0.8 / 1.1**0.5]]), rtol=1e-4, atol=1e-4)


def test_the_parts_of_a_star_start_and_are_handed_out_by_expert():
    experts = StarExperts(3, D, MLP((6,), norm="layer"))
    assert set(experts.weights_of(2)) == {"w_0", "b_0", "norm_weight_0", "norm_bias_0"}
    with pytest.raises(ValueError, match="expert 3 is not in range"):
        experts.weights_of(3)
    with torch.no_grad():
        experts.weights_of(1)["w_0"].fill_(5.0)
    experts.init_each(lambda matrix: matrix.fill_(2.0))
    # The product is what was asked for: 2 from the centre, 1 from each expert.
    x = torch.ones(1, D)
    assert (x @ experts.centre["w_0"]).tolist() == [[2.0 * D] * 6]
    assert (experts.w_0 == 1).all()
    assert not experts.centre["b_0"].any()
