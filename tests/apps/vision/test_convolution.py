"""A V-MoE whose experts are convolutions: class tokens, costs, the picture of its routing, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quiet_trainer import quiet_trainer

import core
from apps.nets.depths import MixtureOfDepths
from apps.report.use import ExpertUse, Labels
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig, VMoE
from apps.vision.module import VisionClassifier
from apps.vision.report import Shown, VisionReportConfig

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
    network = model(vit, replace(EXPERT, prefix_tokens=prefix))
    seen = []
    network.blocks[1].mlp.register_forward_hook(lambda layer, args, y: seen.append(y))
    with core.record(network) as tape:
        logits = network(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 10)
    (entry,), (y,) = tape.entries, seen
    assert entry.routing.num_tokens == 2 * 4
    # ceil(2 * 4 / 4) = 2 of the 4 patches for each expert, in each of 2 images.
    assert entry.routing.tokens_per_expert_E.tolist() == [4, 4, 4, 4]
    assert y.shape == (2, prefix + 16, 8)
    assert not y[:, :prefix].any()
    # The ids of a patch are those of its first token: 0, 2, 8 and 10 after the prefix.
    assert (entry.context.token_ids_BS - prefix).tolist() == [[0, 2, 8, 10]] * 2


def test_flops_are_the_dense_ones_less_the_ffn_plus_the_layer():
    x = torch.randn(2, 1, 8, 8)
    dense = VMoE(VIT, image_size=8, in_chans=1, num_classes=10).eval()
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
        corners = image[::2, ::2]
        assert (image == corners.repeat(2, 0).repeat(2, 1)).all()
    use = ExpertUse(lambda entry, batch: {"class": batch.label}, {"class": Labels("class", 10)})
    use.add(tape, batch)
    # 2 patches for each of 4 experts, in each of 8 images.
    assert use.counts["class"][name].sum(0).tolist() == [16, 16, 16, 16]


def test_a_test_writes_its_report(tmp_path):
    report = VisionReportConfig(few_shot=(), images=1)
    module = VisionClassifier(VIT, MOE, moe_blocks=[1], image_size=8, report=report)
    quiet_trainer(tmp_path).test(module, datamodule=VisionData("digits", eval_batch_size=100), verbose=False)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        *("routing.png", "expert_class.png", "load.png", "sections.json")
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: model(replace(VIT, pool="token")),
            "prefix_tokens=0 of Convolution is not 1, the class and register tokens of vit",
        ),
        (
            lambda: model(expert=replace(EXPERT, prefix_tokens=1)),
            "prefix_tokens=1 of Convolution is not 0, the class and register tokens of vit",
        ),
        (
            lambda: model(replace(VIT, patch_drop=0.5)),
            "vit.patch_drop=0.5 with Convolution, which needs all patches of an image",
        ),
        (
            lambda: model(depths=MixtureOfDepths(), depth_blocks=[1]),
            "depth_blocks names a block with Convolution experts, which need all patches of an image",
        ),
        (lambda: model(image_size=10), "patch_size=2 does not divide a grid of 5 x 5 positions"),
    ],
)
def test_refused_combinations_are_one_line(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_a_gate_on_another_block_is_no_hindrance():
    assert model(depths=MixtureOfDepths(0.5), depth_blocks=[0])(torch.randn(2, 1, 8, 8)).shape == (2, 10)
