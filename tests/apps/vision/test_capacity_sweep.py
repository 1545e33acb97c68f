"""The capacity sweep: FLOPs, drops and accuracy by hand."""

from __future__ import annotations

import pytest
import torch
from small_vit import VIT, batches, sparse

import core
from apps.vision.capacity_sweep import CapacityPoint, capacity_sweep, sweep_picture
from apps.vision.model import VMoE


def test_sweep_counts_flops_of_the_pairs_computed():
    model = sparse()
    data = batches()
    points = capacity_sweep(model, lambda: data, (0.5, None))
    assert [(p.priority, p.capacity_factor) for p in points] == [
        ("position", 0.5),
        ("position", None),
        ("score", 0.5),
        ("score", None),
    ]
    half, whole, half_score, whole_score = points
    assert {p.images for p in points} == {16}
    assert whole.drop_rate == 0.0
    assert (whole.accuracy, whole.flops_per_image) == (whole_score.accuracy, whole_score.flops_per_image)
    with torch.no_grad():
        assert whole.flops_per_image == core.count_flops(model, data[0].image) / 8
        right = sum(int((model(b.image).argmax(-1) == b.label).sum()) for b in data)
    assert whole.accuracy == right / 16
    # 32 tokens a batch choose one of 2 experts; at 0.5 each takes at most ceil(0.5 * 1 * 32 / 2) = 8 of them.
    assert half.drop_rate >= 0.5
    assert half.drop_rate == half_score.drop_rate
    # An expert costs 4 * 8 * 16 = 512 FLOPs a pair, and an image has 4 pairs.
    assert whole.flops_per_image - half.flops_per_image == pytest.approx(512 * 4 * half.drop_rate)


def test_sweep_leaves_the_models_capacity_as_it_was():
    model = sparse(core.MoEConfig(num_experts=2, router=core.TokenChoice(top_k=1), capacity_factor=1.5))
    before = model.blocks[1].mlp.router.capacity
    capacity_sweep(model, batches, (0.5,))
    assert model.blocks[1].mlp.router.capacity == before


def test_sweep_needs_experts_and_images():
    dense = VMoE(VIT, image_size=8, in_chans=1, num_classes=3)
    with pytest.raises(ValueError, match="needs a model with MoE layers"):
        capacity_sweep(dense, batches)
    with pytest.raises(ValueError, match="got no batch"):
        capacity_sweep(sparse(), list)


def test_sweep_figure_has_a_line_a_priority_from_cheap_to_dear():
    points = [CapacityPoint("position", 1.0, 0.9, 4e6, 0.0, 2000), CapacityPoint("position", 0.5, 0.7, 2e6, 0.5, 2000)]
    points += [CapacityPoint("score", 1.0, 0.9, 4e6, 0.0, 2000), CapacityPoint("score", 0.5, 0.8, 2e6, 0.5, 2000)]
    picture = sweep_picture(points)
    assert picture.get_suptitle() == "Accuracy as the evaluation capacity falls, 2,000 images"
    lines = {c.get_label(): c.lines[0] for c in picture.axes[0].containers}
    assert lines["by position"].get_xdata().tolist() == [2.0, 4.0]
    assert lines["batch-prioritised"].get_ydata().tolist() == [80.0, 90.0]
