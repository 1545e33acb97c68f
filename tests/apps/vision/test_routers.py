"""Every routing overlay trains a small V-MoE. Patch positions are the token ids; the class gives task and domain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import core
from apps.equal_cost import routers
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

VIT = ViTConfig(variant="nano", patch_size=2, embed_dim=16, depth=2, num_heads=2, pool="avg")
MOE = core.MoEConfig(num_experts=8, expert=core.FFN(hidden_dim=16))


@pytest.mark.parametrize("name", routers.overlays())
def test_a_few_steps_learn_the_batch(name):
    torch.manual_seed(0)
    moe = routers.with_router(MOE, name)
    model = VisionClassifier(VIT, moe, moe_blocks=[1], image_size=8, report=None)
    image, label = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    context = core.RoutingContext(task_ids_B=label, domain_ids_B=label % getattr(moe.router, "num_domains", 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        with core.record(model) as tape:
            loss = F.cross_entropy(model(image, context), label)
        optimizer.zero_grad()
        (loss + core.aux_loss(tape)).backward()
        optimizer.step()
        core.update_expert_bias(model, tape)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused or name in ("stable",), unused
    stats = core.RoutingStats.from_tape(tape)
    assert list(stats.layers) == ["model.blocks.1.mlp"]
    assert stats.layers["model.blocks.1.mlp"].chosen_per_expert.sum() > 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(image, context), model(image, context))


def test_a_router_of_tasks_says_what_it_lacks():
    model = VisionClassifier(VIT, routers.with_router(MOE, "task"), moe_blocks=[1], image_size=8, report=None)
    with pytest.raises(ValueError, match=r"needs context\.task_ids_B, which is None"):
        model(torch.randn(2, 1, 8, 8))
