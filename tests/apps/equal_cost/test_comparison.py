"""What a comparison asks of a module: costs by hand, other routers and experts, and a search of settings."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from refusals import refused
from tiny_app import TinyModule
from trainings import MOE

import apps.equal_cost.comparison
import core
from apps.base.files import CONFIGS
from apps.equal_cost import routers
from apps.equal_cost.comparison import Comparison, RoutedLayers, Search, equal_widths
from apps.nets.place import Place
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier


def test_every_question_has_an_answer():
    model = Comparison(TinyModule(3, moe=MOE))
    assert model.moe_block_names == ("net.3",)
    assert (model.note, model.baselines(), model.routed_layers()) == ("", {}, None)
    assert model.examples_of_test() == model.compare_examples([], []) == []
    assert model.side_by_side({}) == ""
    assert model.example_values([]) is None
    assert routers.variants(model, []) == {}
    refused("--routers hash: TinyModule has no layer to put it into", routers.variants, model, ["hash"])


class Routed(Comparison):
    def routed_layers(self) -> RoutedLayers:
        return RoutedLayers(self.moe_config, 8, Place("Routed"))

    def with_moe(self, moe: core.MoEConfig) -> core.MoEConfig:
        return moe


def test_a_model_that_computes_every_expert_is_not_called_sparse():
    model = Routed(TinyModule(3, moe=MOE))  # 4 experts
    for router, heading in ((core.TokenChoice(3), "sparse"), (core.Dense(), "MoE, all experts")):
        model.moe_config = dataclasses.replace(MOE, router=router)
        assert model.heading == heading
    # A router of 2 * 8 * 4 FLOPs a token, two of four experts with 2 * 2 * 8 * 8 each.
    assert RoutedLayers(MOE, 8, Place("Tiny")).flops_per_token() == 2 * 8 * 4 + 2 * 2 * 2 * 8 * 8


def test_fine_grained_layers_keep_their_granularity_under_another_router():
    model = Routed(TinyModule(3, moe=MOE))
    model.moe_config = core.MoEConfig(4, core.TokenChoice(2), core.FFN(24), granularity=3)
    assert model.heading == "sparse"
    systems = routers.variants(model, ["switch", "expert_choice"])
    # A token takes 3 * 1 experts of width w in place of 3 * 2 of width 8: w is 16 at equal FLOPs.
    assert systems["router_switch"].note == "TokenChoice, FFN, expert hidden dim 16"
    moe = systems["router_switch"].build()
    assert (moe.granularity, moe.router.top_k, moe.expert.hidden_dim) == (3, 1, 48)
    assert moe.flops_per_token(8) == model.moe_config.flops_per_token(8)
    assert systems["router_expert_choice"].build is None
    assert systems["router_expert_choice"].note.startswith("granularity=3 multiplies top_k, which ExpertChoice")


# D = 4. Plain: 2 * 2 * 4 F FLOPs, 2 * 4 F parameters, with biases F + 4 more. Gated: 3 in place of 2 matrices, 2 F + 4.
@pytest.mark.parametrize(
    "gated, bias, flops, params",
    [(False, True, 160, 94), (False, False, 160, 80), (True, True, 240, 144), (True, False, 240, 120)],
)
def test_a_hidden_dim_of_10_costs_so_much(gated, bias, flops, params):
    widths = equal_widths("dense", core.DenseFFN(gated=gated, bias=bias), 4, flops, params)
    assert widths == {"dense_equal_flops": (10, ""), "dense_equal_params": (10, "")}


def test_dense_ffns_of_equal_cost_have_a_width_or_none():
    # One hidden unit costs 16 FLOPs, two 32: 24 is a third off both, and 163 is 10.2 units.
    widths = equal_widths("dense", core.DenseFFN(), 4, 24, 94, each=" a block")
    assert widths["dense_equal_flops"].problem == "no whole width comes within 5% of 24 flops a block"
    assert equal_widths("dense", core.DenseFFN(), 4, 163, 94)["dense_equal_flops"] == (10, "")


def test_a_setting_is_begun_while_there_is_time_and_then_finished(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(apps.equal_cost.comparison, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kept, ran = [], []

    def lasts(seconds, quality):
        def run():
            ran.append(quality)
            now[0] += seconds
            return quality

        return run

    search = Search(minutes=1, keep=lambda tried: kept.append(dict(tried)))
    assert search.quality("a", lasts(20, 0.1), until=0.5) == 0.1  # 0 s of 30
    assert search.quality("b", lasts(50, 0.2), until=0.5) == 0.2  # 20 s of 30, ends at 70
    assert search.quality("c", lasts(1, 0.3), until=1.0) is None  # 70 s of 60
    assert search.quality("c", lasts(1, 0.3)) == 0.3  # whatever the time
    assert (search.seconds, ran) == (71, [0.1, 0.2, 0.3])
    # Broken off after two, it goes on with the third, and what is known costs nothing.
    again = Search(minutes=2, tried=kept[1])
    assert (again.seconds, again.quality("a", lambda: pytest.fail("tried again"), until=0.0)) == (70, 0.1)
    assert (again.quality("c", lasts(1, 0.3), until=1.0), again.tried["b"]) == (0.3, {"quality": 0.2, "seconds": 50})


EXPERTS = """
model: {init_args: {moe: {num_experts: 3, expert: {class_path: core.Mixed, init_args: {
  experts: [{class_path: core.FFN, init_args: {hidden_dim: 8}}, {class_path: core.Zero}], counts: [2, 1]}}}}}
"""


def test_an_overlay_of_experts_keeps_router_and_balance(tmp_path: Path):
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    moe = core.MoEConfig(8, core.TokenChoice(1), balance=core.Balance(load_balancing_loss=0.5))
    other = routers.with_router(moe, str(tmp_path / "experts.yaml"))
    mixed = core.Mixed((core.FFN(8), core.Zero()), (2, 1))
    assert other == core.MoEConfig(3, core.TokenChoice(1), mixed, balance=moe.balance)


@pytest.mark.parametrize("text, rule", [
    ("model: 3", "other.yaml has no model.init_args, whose moe.router or moe.expert it would set"),
    ("model: {init_args: {share_experts: true}}", "it sets model.init_args.share_experts, and routers are compared"),
    ("model: {init_args: {moe: [{num_experts: 3}]}}", "it sets no fields of one model.init_args.moe for all"),
    ("{model: {init_args: {moe: {num_experts: 3}}}, trainer: {max_epochs: 1}}",
     "it sets trainer, and routers are compared by moe alone"),
    ("model: {init_args: {moe: {expert: 3}}}", "its model.init_args.moe.expert has no class_path"),
])  # fmt: skip
def test_an_overlay_of_something_else_is_refused(tmp_path: Path, text: str, rule: str):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    refused(rule, routers.with_router, core.MoEConfig(8), str(path))


def test_one_command_takes_all_overlays_of_experts_and_shared_ones_are_widened():
    vit = ViTConfig(variant="nano", patch_size=4, embed_dim=16, depth=2, num_heads=2)
    module = VisionClassifier(vit, core.MoEConfig(8, core.TokenChoice(2), core.FFN(32)), [1], image_size=8)
    systems = routers.variants(module.comparison, [str(path) for path in (CONFIGS / "experts").glob("*.yaml")])
    named = {name.removeprefix("router_"): baseline for name, baseline in systems.items()}
    built = {name for name, baseline in named.items() if baseline.build is not None}
    assert built >= {"clamped_swiglu", "expert_dropout", "fine_grained", "lora", "swiglu", "two_widths"}
    assert named["pyramid"].note == "it sets no fields of one model.init_args.moe for all layers"
    assert "depths" in named["mixture_of_depths"].note
    # 8 low-rank updates of rank 8, two a token, are 2 x 32 D FLOPs, and the gate 16 D; an FFN is 4 D F.
    lora = routers.Variant(module.comparison, str(CONFIGS / "experts/lora.yaml"))
    assert lora.config().shared_expert == core.FFN(64 - 16)
    assert named["lora"].note == "TokenChoice, LoRA, shared expert hidden dim 48"
