"""Cheaper forms of a trained model, made in place without training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from converted import EXPERT, IMAGES, MOE, classifier

import core
from apps.train.cost import cheaper
from apps.train.cost.cheaper import cheaper_forms, limit, take_fewer


def names(model, statistics="no batches"):
    return [form.name for form in cheaper_forms(model, statistics) if form.kind != cheaper.QUANTIZED]


def forms(model, statistics="no batches"):
    return {form.name: form for form in cheaper_forms(model, statistics)}


def routing(model):
    with core.record(model) as tape:
        model.eval()(IMAGES)
    (entry,) = tape.entries
    return entry.routing


SHARES = ["75 % of the experts", "50 % of the experts", "25 % of the experts"]


def test_the_forms_are_less_than_the_model_has_and_many_values_of_k_have_equal_ratios():
    capacities = ["capacity 2", "capacity 1.25", "capacity 1", "capacity 0.75", "capacity 0.5"]
    assert names(classifier(MOE)) == ["top_k=1", *capacities, *SHARES]
    tight = dataclasses.replace(MOE, router=core.TokenChoice(top_k=1), eval_capacity_factor=1.0)
    assert names(classifier(tight)) == ["capacity 0.75", "capacity 0.5", *SHARES]
    assert names(classifier(core.MoEConfig(4, core.SoftSlots(), EXPERT))) == SHARES  # no pairs, no capacity
    many = core.MoEConfig(32, core.TokenChoice(top_k=16), core.FFN(hidden_dim=4))
    # 16^(i / 8) = 2^(i / 2): 1, 1.41, 2, 2.83, 4, 5.66, 8, 11.3
    assert names(classifier(many))[:7] == [f"top_k={k}" for k in (1, 2, 3, 4, 6, 8, 11)]
    with pytest.raises(ValueError, match="a VisionClassifier without MoE layers has no experts that could be made"):
        cheaper_forms(classifier(None), "no batches")


def test_of_one_expert_the_gate_is_1_where_the_gates_had_the_sum_1():
    model = classifier(MOE)
    before = routing(model)
    assert before.num_tokens * 2 == len(before.gates_N)
    take_fewer(model, 1)
    after = routing(model)
    assert len(after.gates_N) == after.num_tokens
    assert after.gates_N.unique().tolist() == [1.0]
    best_T = before.evidence.scores_TE.argmax(1)
    order_N = after.token_index_N.argsort()
    assert torch.equal(after.expert_ids_N[order_N], best_T)


def test_a_gate_that_is_a_share_of_all_scores_stays_one():
    model = classifier(dataclasses.replace(MOE, router=core.TokenChoice(top_k=2, normalize=False)))
    best_T = routing(model).evidence.scores_TE.amax(1)
    take_fewer(model, 1)
    after = routing(model)
    torch.testing.assert_close(after.gates_N[after.token_index_N.argsort()], best_T)


def test_an_option_that_needs_two_experts_leaves_the_model_as_it_was():
    model = classifier(dataclasses.replace(MOE, router=core.TokenChoice(top_k=2, second_expert_policy="random")))
    with pytest.raises(ValueError, match="second"):
        take_fewer(model, 1)
    assert [
        router.config.top_k for layer in core.moe_layers(model).values() for router in layer.routers().values()
    ] == [2]


def test_a_limit_drops_what_is_over_it():
    model = classifier(MOE)
    limit(model, 0.5)
    own = routing(model)
    # 5 images of 4 patches choose 2 of 4 experts: each expert takes at most ceil(0.5 * 2 * 20 / 4) = 5 of 40 pairs.
    assert own.tokens_per_expert_E.tolist() == [5, 5, 5, 5]
    limit(model, 2.0)  # no more than it has
    assert routing(model).tokens_per_expert_E.tolist() == [5, 5, 5, 5]


def test_the_experts_that_compute_most_rows_stay():
    model = classifier(MOE)
    model.eval()
    used_E = routing(model).tokens_per_expert_E
    statistics = core.expert_statistics(model, [IMAGES])
    forms(model, statistics)["50 % of the experts"].change(model)
    (layer,) = core.moe_layers(model).values()
    assert layer.experts.num_experts == 2
    kept = sorted(used_E.topk(2).indices.tolist())
    fresh = classifier(MOE)
    (whole,) = core.moe_layers(fresh).values()
    assert torch.equal(layer.experts.w_in, whole.experts.w_in[kept])
    with pytest.raises(ValueError, match="no batches"):
        forms(model)["50 % of the experts"].change(model)
    with pytest.raises(ValueError, match="top_k=2 exceeds num_experts=1"):
        forms(fresh, statistics)["25 % of the experts"].change(fresh)
