"""The dense baselines of one and of two towers cost what the sparse model does."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from small_pairs import TOWER, pair_batch, retriever

import core
from apps.compare.systems import find_systems
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.two_towers import TwoTowers
from apps.train.cost.flops import Cost, measure_cost

BATCH = pair_batch(6)
WIDER = replace(TOWER, width=24)


def built(module: Any) -> dict[str, tuple[Any, Cost]]:
    """Return the baselines that can be built, with their costs."""
    twins = {name: baseline.build() for name, baseline in module.baselines().items() if baseline.build}
    return {name: (twin, measure_cost(twin, BATCH)) for name, twin in twins.items()}


def test_a_single_tower_is_compared_with_one_and_with_two():
    module = retriever(moe_blocks="all")
    cost, twins = measure_cost(module, BATCH), built(retriever(moe_blocks="all"))
    assert list(twins) == ["dense_equal_flops", "dense_equal_params", "two_towers"]
    dense, of_one = twins["dense_equal_flops"]
    assert of_one.flops_per_example == pytest.approx(cost.flops_per_example, rel=0.02)
    assert twins["dense_equal_params"][1].num_params == pytest.approx(cost.num_params, rel=0.02)
    two, of_two = twins["two_towers"]
    assert of_two.flops_per_example == of_one.flops_per_example
    blocks = sum(p.numel() for p in dense.model.towers.stack.parameters())
    assert of_two.num_params == of_one.num_params + blocks
    assert two.moe is None
    systems = {system.name: system for system in find_systems(module, BATCH)}
    assert not any(system.refused for system in systems.values())
    assert systems["two_towers"].flops_ratio == pytest.approx(1.0, rel=0.02)


def test_two_towers_of_different_widths_have_an_ffn_for_each():
    tower = TwoTowers(PatchImages(blocks_as=WIDER), PieceTexts(blocks_as=TOWER))
    module = retriever(tower=tower, moe_blocks="all")
    cost, twins = measure_cost(module, BATCH, module.moe_block_names), built(module)
    assert list(twins) == ["dense_equal_flops", "dense_equal_params"]
    dense, of_dense = twins["dense_equal_flops"]
    assert of_dense.flops_per_example == pytest.approx(cost.flops_per_example, rel=0.02)
    assert twins["dense_equal_params"][1].num_params == pytest.approx(cost.num_params, rel=0.02)
    # A token of width D takes 2 experts, 2 products of D x 16 each, and a router of 4 D: a hidden dim of 32 + 2.
    assert (dense.dense_ffn.hidden_dim, dense.tower.text_ffn.hidden_dim) == (34, 34)
    assert not any(system.refused for system in find_systems(module, BATCH))
    again = pickle.loads(pickle.dumps(module.baselines()["dense_equal_flops"].build))()
    assert again.tower == dense.tower


def test_a_tower_without_experts_stays_as_it_is():
    tower = TwoTowers(PatchImages(blocks_as=WIDER, moe_blocks="none"), PieceTexts(blocks_as=TOWER))
    module = retriever(tower=tower)
    cost, twins = measure_cost(module, BATCH), built(module)
    dense, of_dense = twins["dense_equal_flops"]
    assert of_dense.flops_per_example == pytest.approx(cost.flops_per_example, rel=0.02)
    assert dense.model.towers.image.network.stack.layers[1].ffn.w_in.weight.shape[0] == TOWER.hidden_dim
    assert dense.model.towers.text.network.stack.layers[1].ffn.w_in.weight.shape[0] == 34


def test_widths_that_coincide_are_trained_once():
    moe = core.MoEConfig(2, core.TokenChoice(top_k=2), core.FFN(hidden_dim=512, bias=True))
    tower = TwoTowers(PatchImages(blocks_as=WIDER), PieceTexts(blocks_as=TOWER))
    notes = {name: baseline.note for name, baseline in retriever(tower=tower, moe=moe).baselines().items()}
    assert notes["dense_equal_params"].startswith("coincides with dense_equal_flops")


def test_a_dense_model_has_none():
    assert retriever(moe=None).baselines() == {}
