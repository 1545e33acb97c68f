"""Overlays that put another router, or other experts, into a config's layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import core
from apps.base.files import CONFIGS
from apps.equal_cost import routers
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

EXPERTS = """
model:
  init_args:
    moe:
      num_experts: 3
      expert:
        class_path: core.Mixed
        init_args:
          experts: [{class_path: core.FFN, init_args: {hidden_dim: 8}}, {class_path: core.Zero}]
          counts: [2, 1]
"""


def test_an_overlay_of_experts_keeps_router_and_balance(tmp_path: Path):
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    moe = core.MoEConfig(8, core.TokenChoice(1), balance=core.Balance(load_balancing_loss=0.5))
    other = routers.with_router(moe, str(tmp_path / "experts.yaml"))
    assert other == core.MoEConfig(
        3,
        core.TokenChoice(1),
        core.Mixed((core.FFN(8), core.Zero()), (2, 1)),
        balance=core.Balance(load_balancing_loss=0.5),
    )


@pytest.mark.parametrize(
    "text, rule",
    [
        ("model: 3", "other.yaml has no model.init_args, whose moe.router or moe.expert it would set"),
        (
            "model: {init_args: {share_experts: true}}",
            "it sets model.init_args.share_experts, and routers are compared",
        ),
        ("model: {init_args: {moe: [{num_experts: 3}]}}", "it sets no fields of one model.init_args.moe for all"),
        (
            "{model: {init_args: {moe: {num_experts: 3}}}, trainer: {max_epochs: 1}}",
            "it sets trainer, and routers are compared by moe alone",
        ),
        ("model: {init_args: {moe: {expert: 3}}}", "its model.init_args.moe.expert has no class_path"),
    ],
)
def test_an_overlay_of_something_else_is_refused(tmp_path: Path, text: str, rule: str):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rule):
        routers.with_router(core.MoEConfig(8), str(path))


def test_shared_experts_are_widened_where_the_routed_ones_have_no_width(tmp_path: Path):
    """8 low-rank updates of rank 8, two a token, are 2 x 32 D FLOPs, and the gate 16 D; an FFN is 4 D F."""
    vit = ViTConfig(variant="nano", patch_size=4, embed_dim=16, depth=2, num_heads=2)
    module = VisionClassifier(vit, core.MoEConfig(8, core.TokenChoice(2), core.FFN(32)), [1], image_size=8)
    path = str(CONFIGS / "experts/lora.yaml")
    shared = routers.Variant(module, path).config().shared_expert
    assert shared == core.FFN(64 - 16)
    assert routers.variants(module, [path])["router_lora"].note == "TokenChoice, LoRA, shared expert hidden dim 48"


def test_one_command_takes_all_overlays_of_experts():
    vit = ViTConfig(variant="nano", patch_size=4, embed_dim=16, depth=2, num_heads=2)
    module = VisionClassifier(vit, core.MoEConfig(8, core.TokenChoice(2), core.FFN(32)), [1], image_size=8)
    systems = routers.variants(module, [str(path) for path in (CONFIGS / "experts").glob("*.yaml")])
    named = {name.removeprefix("router_"): baseline for name, baseline in systems.items()}
    built = {name for name, baseline in named.items() if baseline.build is not None}
    assert built >= {"clamped_swiglu", "expert_dropout", "fine_grained", "lora", "swiglu", "two_widths"}
    assert named["pyramid"].note == "it sets no fields of one model.init_args.moe for all layers"
    assert "depths" in named["mixture_of_depths"].note
