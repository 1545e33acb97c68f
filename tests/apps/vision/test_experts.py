"""Every routing overlay trains a small V-MoE, and what is special where experts are convolutions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

import core
from apps.equal_cost import routers
from apps.nets.depths import MixtureOfDepths
from apps.report.use import ExpertUse, Labels
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig, VMoE
from apps.vision.module import VisionClassifier
from apps.vision.report import Shown

ROUTED = ViTConfig(variant="nano", patch_size=2, embed_dim=16, depth=2, num_heads=2, pool="avg")
EIGHT = core.MoEConfig(num_experts=8, expert=core.FFN(hidden_dim=16))


@pytest.mark.parametrize("name", routers.overlays())
def test_a_few_steps_learn_the_batch(name):
    torch.manual_seed(0)
    moe = routers.with_router(EIGHT, name)
    model = VisionClassifier(ROUTED, moe, moe_blocks=[1], image_size=8, report=None)
    image, label = torch.randn(10, 1, 8, 8), torch.arange(10)
    context = core.RoutingContext(task_ids_B=label, domain_ids_B=label % getattr(moe.router, "num_domains", 1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-2), []
    for _ in range(4):
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
    model = VisionClassifier(ROUTED, routers.with_router(EIGHT, "task"), moe_blocks=[1], image_size=8, report=None)
    refused(r"needs context\.task_ids_B, which is None", model, torch.randn(2, 1, 8, 8))


# 8x8 images: a grid of 4x4 tokens, and so 4 patches of 2x2 of them.
VIT = ViTConfig(patch_size=2, embed_dim=8, depth=2, num_heads=2, pool="avg")
EXPERT = core.Convolution(6)
MOE = core.MoEConfig(4, core.ExpertChoice(2.0), EXPERT)


def model(vit=VIT, expert=EXPERT, image_size=8, **options):
    torch.manual_seed(0)
    moe = replace(MOE, expert=expert)
    return VMoE(vit, image_size=image_size, in_chans=1, num_classes=10, ffn=moe, moe_blocks=[1], **options).eval()


@pytest.mark.parametrize(("vit", "prefix"), [(VIT, 0), (replace(VIT, pool="token", reg_tokens=2), 3)])
def test_experts_take_patches_and_leave_class_and_register_tokens(vit, prefix):
    network, seen = model(vit, replace(EXPERT, prefix_tokens=prefix)), []
    network.blocks[1].mlp.register_forward_hook(lambda layer, args, y: seen.append(y))
    with core.record(network) as tape:
        logits = network(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 10)
    (entry,), (y,) = tape.entries, seen
    assert entry.routing.num_tokens == 2 * 4
    # ceil(2 * 4 / 4) = 2 of the 4 patches for each expert, in each of 2 images.
    assert (entry.routing.tokens_per_expert_E.tolist(), y.shape) == ([4, 4, 4, 4], (2, prefix + 16, 8))
    assert not y[:, :prefix].any()
    # The ids of a patch are those of its first token: 0, 2, 8 and 10 after the prefix.
    assert (entry.context.token_ids_BS - prefix).tolist() == [[0, 2, 8, 10]] * 2


def test_flops_are_the_dense_ones_less_the_ffn_plus_the_layer():
    x, dense = torch.randn(2, 1, 8, 8), VMoE(VIT, image_size=8, in_chans=1, num_classes=10).eval()
    # 16 tokens. FFN: 4 * 8 * 32 a token.
    ffn, layer = 4 * 8 * 32, MOE.flops_per_token(8, tokens_per_sequence=16)
    with torch.no_grad():
        assert core.count_flops(model(), x) - core.count_flops(dense, x) == 2 * 16 * (layer - ffn)


def test_the_picture_shows_the_expert_of_a_patch_at_each_of_its_tokens():
    network, data, shown = model(), VisionData("digits", eval_batch_size=8), Shown()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad(), core.record(network) as tape:
        network(batch.image)
    shown.add(network, tape, batch, 3)
    ((name, ids),) = shown.experts.items()
    assert (name, len(ids), ids[0].shape) == ("block 1", 3, (4, 4))
    for image in ids:
        assert (image == image[::2, ::2].repeat(2, 0).repeat(2, 1)).all()
    use = ExpertUse(lambda entry, batch: {"class": batch.label}, {"class": Labels("class", 10)})
    use.add(tape, batch)
    # 2 patches for each of 4 experts, in each of 8 images.
    assert use.counts["class"][name].sum(0).tolist() == [16, 16, 16, 16]


@pytest.mark.parametrize("options, message", [
    ({"vit": replace(VIT, pool="token")}, "prefix_tokens=0 of Convolution is not 1, the class and register tokens"),
    ({"expert": replace(EXPERT, prefix_tokens=1)}, "prefix_tokens=1 of Convolution is not 0, the class and register"),
    ({"vit": replace(VIT, patch_drop=0.5)}, "vit.patch_drop=0.5 with Convolution, which needs all patches of an image"),
    ({"depths": MixtureOfDepths(), "depth_blocks": [1]}, "depth_blocks names a block with Convolution experts, which"),
    ({"image_size": 10}, "patch_size=2 does not divide a grid of 5 x 5 positions"),
])  # fmt: skip
def test_refused_combinations_are_one_line(options, message):
    refused(f"^{message}", model, **options)
    # A gate on another block is no hindrance.
    assert model(depths=MixtureOfDepths(0.5), depth_blocks=[0])(torch.randn(2, 1, 8, 8)).shape == (2, 10)
