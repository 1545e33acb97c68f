"""A module answers a comparison by defaults where it says nothing itself."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_app import TinyModule
from trainings import MOE

import core
from apps.equal_cost import routers
from apps.equal_cost.comparable import Comparable, RoutedLayers
from apps.nets.place import Place


class Silent(TinyModule, Comparable):
    """A module with an MoE layer that tells a comparison nothing."""


def test_every_question_has_an_answer():
    module = Silent(3, moe=MOE)
    assert module.moe_block_names == ("net.3",)
    assert (module.note, module.baselines(), module.routed_layers()) == ("", {}, None)
    assert module.examples_of_test() == module.compare_examples([], []) == []
    assert module.side_by_side({}) == ""
    assert module.example_values([]) is None
    assert routers.variants(module, []) == {}
    with pytest.raises(ValueError, match="--routers hash: Silent has no layer to put it into"):
        routers.variants(module, ["hash"])


class Routed(Silent):
    def routed_layers(self) -> RoutedLayers:
        return RoutedLayers(self.moe_config, 8, Place("Routed"))


@pytest.mark.parametrize(
    ("router", "heading"),
    [(core.TokenChoice(3), "sparse"), (core.Dense(), "MoE, all experts")],
    ids=["sparse", "dense"],
)
def test_a_model_that_computes_every_expert_is_not_called_sparse(router, heading):
    module = Routed(3, moe=MOE)
    module.moe_config = dataclasses.replace(MOE, router=router)  # 4 experts
    assert module.heading == heading


def test_flops_of_routed_layers_are_those_of_their_config():
    # A router of 2 * 8 * 4 FLOPs a token, two of four experts with 2 * 2 * 8 * 8 each.
    assert RoutedLayers(MOE, 8, Place("Tiny")).flops_per_token() == 2 * 8 * 4 + 2 * 2 * 2 * 8 * 8


class WithLayers(Routed):
    """A module whose layers a comparison may change."""

    def with_moe(self, moe: core.MoEConfig) -> core.MoEConfig:
        return moe


def test_fine_grained_layers_keep_their_granularity_under_another_router():
    module = WithLayers(3, moe=MOE)
    module.moe_config = core.MoEConfig(4, core.TokenChoice(2), core.FFN(24), granularity=3)
    assert module.heading == "sparse"
    systems = routers.variants(module, ["switch", "expert_choice"])
    # A token takes 3 * 1 experts of width w in place of 3 * 2 of width 8: w is 16 at equal FLOPs.
    assert systems["router_switch"].note == "TokenChoice, FFN, expert hidden dim 16"
    moe = systems["router_switch"].build()
    assert (moe.granularity, moe.router.top_k, moe.expert.hidden_dim) == (3, 1, 48)
    assert moe.flops_per_token(8) == module.moe_config.flops_per_token(8)
    assert systems["router_expert_choice"].build is None
    assert systems["router_expert_choice"].note.startswith("granularity=3 multiplies top_k, which ExpertChoice")
