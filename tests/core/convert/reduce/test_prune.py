"""Fewer experts in a layer: those that stay compute what they did, and the router chooses among them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from shrinking import ROUTERS, D, built, tokens
from torch import nn
from torch.testing import assert_close

import core
from core import (
    FFN,
    ExpertStatistics,
    MoEConfig,
    RoutingContext,
    Task,
    TokenChoice,
    expert_statistics,
    keep_experts,
    merge_experts,
    prune_experts,
)
from core.convert.reduce.prune import cluster_by_average

CONTEXT = RoutingContext(token_ids_BS=torch.arange(24).view(2, 12) % 20, task_ids_B=torch.tensor([0, 2]))


def given(loads, gated=None, norms=None, squares=None, outputs=None, every=None) -> ExpertStatistics:
    """Return made statistics; what is not given is 1."""
    ones = torch.ones(len(loads), dtype=torch.float64)

    def of(values):
        return ones if values is None else torch.tensor(values, dtype=torch.float64)

    wide = torch.zeros(len(loads), D, dtype=torch.float64) if outputs is None else of(outputs)
    return ExpertStatistics(of(loads), of(gated), of(norms), of(squares), wide, None if every is None else of(every))


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        ("use", (1, 2)),
        ("reap", (0, 3)),  # 8/2, 9/9, 8/8, 6/1
        ("man", (0, 2)),  # 20/2, 9/9, 40/8, 3/1
        ("msan", (2, 3)),  # 40/2, 90/9, 400/8, 30/1
        ("spread", (1, 2)),  # 40 - 36/2, 90 - 9/9, 400 - 0/8, 30 - 25/1
    ],
)
def test_scores_by_hand(by, kept):
    outputs = torch.zeros(4, D)
    outputs[:, 0] = torch.tensor([6.0, 3.0, 0.0, 5.0])
    own = given([2, 9, 8, 1], [8, 9, 8, 6], [20, 9, 40, 3], [40, 90, 400, 30], outputs.tolist())
    layer = built(MoEConfig(4, TokenChoice(1), FFN(6)))
    before = [layer.experts.weights_of(e)["w_in"].clone() for e in range(4)]
    row = layer.router.gate.weight.detach().clone()
    assert prune_experts(layer, own, 2, by) == {"": kept}
    for new, old in enumerate(kept):
        assert torch.equal(layer.experts.weights_of(new)["w_in"], before[old])
        assert torch.equal(layer.router.gate.weight[new], row[old])


def test_a_token_chooses_among_the_experts_that_are_left():
    layer = built(MoEConfig(5, TokenChoice(2, gate_bias=True), FFN(6, bias=True), num_shared_experts=1)).eval()
    masked = copy.deepcopy(layer)
    with torch.no_grad():
        masked.router.gate.bias[[0, 3]] = -1e4
    keep_experts(layer, [4, 1, 2])
    assert_close(layer(tokens()), masked(tokens()))


@pytest.mark.parametrize("router", [*ROUTERS.values(), Task(3)], ids=[*ROUTERS, "Task"])
def test_a_pruned_layer_trains_and_loads_into_one_that_is_built_smaller(router):
    config = MoEConfig(6, router, core.SwiGLU(6, bias=True))
    layer = built(config)
    if not isinstance(router, Task):  # what was grown is taken away again
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        new = core.grow_experts(layer, 2)
        keep_experts(layer, [e for e in range(8) if e not in new])
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
    keep_experts(layer, [0, 2, 4, 5])
    smaller = built(replace(config, num_experts=4), seed=1)
    smaller.load_state_dict(layer.state_dict())
    assert torch.equal(smaller.eval()(tokens(), CONTEXT), layer.eval()(tokens(), CONTEXT))
    assert (smaller.num_experts, smaller.pairs_per_token) == (layer.num_experts, layer.pairs_per_token)
    assert core.active_params(smaller) == core.active_params(layer)
    layer.train()(tokens(), CONTEXT).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert layer.experts.w_in.grad.any()


def test_groups_keep_as_many_each():
    layer = built(MoEConfig(8, core.Prototypes(2), FFN(6)))
    own = given([1, 2, 3, 4, 50, 60, 70, 80])
    assert prune_experts(layer, own, 0.5, "use") == {"": (2, 3, 6, 7)}
    with pytest.raises(ValueError, match=r"groups of experts would keep \[2, 1\] of them"):
        keep_experts(layer, [0, 1, 2])
    with pytest.raises(ValueError, match="keep=3 is not the same number for each of 2 groups"):
        prune_experts(layer, given([1] * 4), 3)


def test_half_of_the_experts_of_a_model():
    model = nn.Sequential(built(MoEConfig(8, TokenChoice(2))), built(MoEConfig(4, TokenChoice(1)), seed=1))
    statistics = expert_statistics(model, [tokens()])
    kept = prune_experts(model, statistics, 0.5, "use")
    assert [len(kept[name]) for name in ("0", "1")] == [4, 2]
    loads = statistics["0"].loads_E.tolist()
    assert min(loads[e] for e in kept["0"]) >= max(loads[e] for e in range(8) if e not in kept["0"])
    assert model(tokens()).shape == (2, 12, D)


@pytest.mark.parametrize("router", [TokenChoice(2), TokenChoice(2, expert_bias=True), core.NullExperts(2, 2), Task(3)])
def test_constants_stand_in_for_the_experts_that_go(router):
    layer = built(MoEConfig(4, router, FFN(6, bias=True))).eval()
    own = expert_statistics(layer, [(tokens(), CONTEXT)])[""]
    kept = prune_experts(copy.deepcopy(layer), own, 2, "spread", constants=True)[""]
    x_TD, routing = tokens().flatten(0, 1), layer.router(tokens(), CONTEXT)
    expected = torch.zeros_like(x_TD)
    pairs = zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N.tolist(), strict=True)
    for t, e, gate in pairs:
        if e in kept:
            expected[t] += gate * core.cut_out(layer, expert=e)(x_TD[t : t + 1])[0]
        elif e < 4:
            expected[t] += gate * own.mean_output_ED[e].float()
    assert prune_experts(layer, own, 2, "spread", constants=True) == {"": kept}
    assert_close(layer(tokens(), CONTEXT).flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
    again = built(MoEConfig(4, router, core.Mixed((FFN(6, bias=True), core.Constant()), (2, 2))), seed=1).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(tokens(), CONTEXT), layer(tokens(), CONTEXT))
    layer.train()(tokens(), CONTEXT).sum().backward()
    assert layer.experts.parts[1].v.grad.any()


def test_merged_experts_are_means_by_load():
    # Mean outputs 0, 10, 1 and 12: 0 and 2 are merged first, then 1 and 3.
    every = torch.zeros(4, D)
    every[:, 0] = torch.tensor([0.0, 10.0, 1.0, 12.0])
    layer = built(MoEConfig(4, TokenChoice(1), FFN(6)))
    w, gate = layer.experts.w_in.detach().clone(), layer.router.gate.weight.detach().clone()
    assert merge_experts(layer, given([3, 0, 1, 0], every=every.tolist()), 2) == {"": ((0, 2), (1, 3))}
    assert_close(layer.experts.w_in[0], 0.75 * w[0] + 0.25 * w[2])
    assert_close(layer.experts.w_in[1], (w[1] + w[3]) / 2)  # no loads: equal parts
    assert_close(layer.router.gate.weight[0], 0.75 * gate[0] + 0.25 * gate[2])


def test_clusters_are_those_of_a_loop_over_all_pairs():
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = torch.cdist(points, points)
    clusters = [[e] for e in range(9)]
    while len(clusters) > 4:

        def mean(pair, clusters=clusters):
            a, b = (clusters[i] for i in pair)
            return float(torch.stack([distance[i, j] for i in a for j in b]).mean())

        i, j = min(((i, j) for j in range(len(clusters)) for i in range(j)), key=mean)
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    assert cluster_by_average(distance, 4) == clusters


REFUSED = {
    "too many": (MoEConfig(4), given([1] * 4), 5, {}, "keep=5 exceeds num_experts=4"),
    "none": (MoEConfig(4), given([1] * 4), 0, {}, "keep=0 is not at least 1"),
    "a share": (MoEConfig(4), given([1] * 4), 1.5, {}, "keep=1.5 is neither an integer nor a share"),
    "top_k": (MoEConfig(4, TokenChoice(3)), given([1] * 4), 2, {}, "top_k=3 exceeds num_experts=2"),
    "a score": (MoEConfig(4), given([1] * 4), 2, {"by": "size"}, "by='size' is not one of use, reap, man, msan"),
    "of others": (MoEConfig(4), given([1] * 3), 2, {}, "statistics of layer '' are of 3 experts, and it has 4"),
    "no statistics": (MoEConfig(4), None, 2, {}, "statistics are needed"),
    "loads": (MoEConfig(4), [1.0] * 4, 2, {}, "statistics of layer '' are a list"),
    "hash": (MoEConfig(4, core.Hash(20)), given([1] * 4), 2, {}, "router Hash (arXiv 2106.04426) cannot shrink"),
    "domain": (MoEConfig(4, core.Domain(4)), given([1] * 4), 2, {}, "router Domain (arXiv 2108.05036) cannot shrink"),
    "logits of all": (MoEConfig(4, TokenChoice(logit_norm=1.0)), given([1] * 4), 2, {}, "TokenChoice cannot shrink"),
    "a default": (MoEConfig(8, core.Cosine(1)), given([1] * 8), 4, {}, "gate.projection would shrink from (4, 8) to"),
    "several kinds": (
        MoEConfig(2, expert=core.Mixed((FFN(4), core.Zero()), (1, 1))),
        given([1] * 2),
        1,
        {},
        "MixedExperts of several kinds cannot shrink",
    ),
    "constants": (MoEConfig(4, core.Prototypes(2)), given([1] * 4), 2, {"constants": True}, "sees 2 groups of experts"),
}
ONES = given([1] * 4)
OTHER = {
    "no tokens": (
        lambda: merge_experts(built(MoEConfig(4)), given([1, 1, 1, 0]), 2),
        "expert 3 of layer '' has no tokens: take statistics with every_token=True",
    ),
    "no mean": (
        lambda: merge_experts(built(MoEConfig(4, expert=core.Identity())), ONES, 2),
        "IdentityExperts cannot be merged",
    ),
    "adapters": (
        lambda: merge_experts(core.add_adapters(built(MoEConfig(4)), core.LoRA(2), modules="experts"), ONES, 2),
        "FFNExperts have adapters: core.merge_adapters merges them before",
    ),
    "range": (lambda: keep_experts(built(MoEConfig(4)), [4]), "expert 4 is not in range(4)"),
    "nothing": (lambda: keep_experts(built(MoEConfig(4)), []), "a layer keeps at least one expert"),
    "gates": (
        lambda: keep_experts(core.MMoE(4).build(D, 2), [0]),
        "a MultiGateMoE does not shrink: core.MoE and its subclasses do",
    ),
}


@pytest.mark.parametrize(("make", "message"), OTHER.values(), ids=OTHER)
def test_other_refusals(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
    model = nn.Sequential(built(MoEConfig(4)), built(MoEConfig(2)))
    with pytest.raises(ValueError, match="top_k=2 exceeds num_experts=1"):
        prune_experts(model, {"0": ONES, "1": given([1] * 2)}, 0.5)
    assert model[0].num_experts == 4  # nothing is done where a later layer is refused


@pytest.mark.parametrize(("config", "statistics", "keep", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_left_as_it_was(config, statistics, keep, options, message):
    layer = built(config)
    shapes = {k: v.shape for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError) as error:
        prune_experts(layer, statistics, keep, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert {k: v.shape for k, v in layer.state_dict().items()} == shapes
    assert layer.num_experts == config.num_experts
