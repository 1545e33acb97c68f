"""Classifiers of timm: their MLPs are MoE layers, their twins cost as much, and weights begin as published."""

import dataclasses
import pickle

import pytest
import timm
import torch
from made_images import ready
from quiet_trainer import quiet_trainer
from refusals import refused
from safetensors.torch import save_file
from torch.testing import assert_close

import core
from apps.vision.backbone import TimmConfig, build_backbone
from apps.vision.conv import ConvConfig
from apps.vision.module import VisionClassifier
from apps.vision.report import VisionReportConfig

MOE = core.MoEConfig(4, core.TokenChoice(top_k=2))
SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4}
VIT = TimmConfig("vit_tiny_patch16_224", args=SMALL)
KINDS = {
    "vit_tiny_patch16_224": 32, "convnext_atto": 32, "swin_tiny_patch4_window7_224": 56, "poolformer_s12": 32,
    "mixer_s16_224": 32, "deit_tiny_patch16_224": 32, "eva02_tiny_patch14_224": 28, "resmlp_12_224": 32,
    "mobilevit_xxs": 32, "cait_xxs24_224": 32, "xcit_nano_12_p16_224": 32, "edgenext_xx_small": 32,
    "convnext_pico": 32, "deit3_small_patch16_224": 32, "beit_base_patch16_224": 32, "swinv2_cr_tiny_ns_224": 224,
    "poolformer_s24": 32, "vit_relpos_small_patch16_224": 32, "flexivit_small": 32, "vit_srelpos_small_patch16_224": 32,
    "twins_svt_small": 64, "nest_tiny": 224, "pit_ti_224": 224, "coat_lite_tiny": 64, "crossvit_tiny_240": 240,
    "convnext_femto": 32, "volo_d1_224": 64, "efficientformer_l1": 224, "fastvit_t8": 32, "hiera_tiny_224": 224,
}  # fmt: skip
QUICK = ("vit_tiny_patch16_224", "convnext_atto", "poolformer_s12", "mixer_s16_224", "eva02_tiny_patch14_224")
SWIN = TimmConfig(
    "swin_tiny_patch4_window7_224",
    args={"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
)


def build(backbone=VIT, moe=MOE, **kwargs):
    torch.manual_seed(0)
    options = {"moe_blocks": [-1], "image_size": 8, "report": None, **kwargs}
    return VisionClassifier(backbone=backbone, moe=moe, **options)


def images(n=3, chans=1, size=8):
    return torch.randn(n, chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_an_architecture_has_experts_learns_a_step_and_its_twin_costs_as_much(name):
    size = KINDS[name]
    sparse = build(TimmConfig(name), image_size=size, in_chans=3)
    (layer,) = core.moe_layers(sparse).values()
    assert layer.num_experts == 4
    x, before = images(2, 3, size), [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
    for _ in range(2):  # some heads begin as zeros, behind which nothing has a gradient at first
        torch.nn.functional.cross_entropy(sparse(x), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    twin = pickle.loads(pickle.dumps(sparse.comparison.baselines()["dense_equal_flops"].build))()
    assert not core.moe_layers(twin)
    assert core.count_flops(twin.eval(), x) == pytest.approx(core.count_flops(sparse.eval(), x), rel=0.005)
    names = dict(twin.named_modules())
    assert all(block in names for block in sparse.comparison.moe_block_names)
    assert (
        sparse.comparison.heading,
        build(TimmConfig(name), None, image_size=size, in_chans=3).comparison.baselines(),
    ) == ("sparse", {})


def test_a_dense_one_is_timms_own():
    ours = build(moe=None)
    torch.manual_seed(0)
    theirs = timm.create_model(VIT.name, img_size=8, in_chans=1, num_classes=10, **SMALL)
    assert_close(ours.model.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert_close(ours(images()), theirs(images()), rtol=0, atol=0)
    assert ours.readout == ("model.head",)


def test_routers_are_compared_where_the_layers_are_alike():
    layers = build(moe_blocks="all").comparison.routed_layers()
    assert layers.dim == SMALL["embed_dim"]
    assert layers.config == dataclasses.replace(MOE, expert=core.FFN(64, bias=True))  # as wide as the MLP was
    assert layers.flops_arguments == {"tokens_per_sequence": (8 // SMALL["patch_size"]) ** 2 + 1}
    assert build(SWIN, moe_blocks="all").comparison.routed_layers() is None  # its second stage is twice as wide
    assert build(moe=None).comparison.routed_layers() is None


def test_published_weights_are_where_it_begins_and_experts_are_copies(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(VIT.name, img_size=8, in_chans=1, num_classes=10, **SMALL)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    config = TimmConfig(VIT.name, str(tmp_path / "w.safetensors"), SMALL)
    module = build(config).eval()
    module.setup("fit")
    assert len(core.moe_layers(module)) == 1
    assert_close(module(images()), source.eval()(images()))
    twin = module.comparison.baselines()["dense_equal_flops"].build().eval()
    twin.setup("fit")
    assert_close(twin(images()), source(images()))
    save_file({**source.state_dict(), "norm.weight": torch.ones(8)}, tmp_path / "other.safetensors")
    wrong = build(TimmConfig(VIT.name, str(tmp_path / "other.safetensors"), SMALL))
    refused("norm.weight", wrong.setup, "fit")


@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["ViT", "Swin"])
def test_it_trains_is_reported_and_its_checkpoint_loads(backbone, tmp_path):
    module = build(backbone, moe_blocks="all", report=VisionReportConfig(few_shot=(2,), few_shot_seeds=1, images=2))
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=1, num_sanity_val_steps=0)
    data = ready("digits", batch_size=8, subset=32)
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert "test/few_shot_2" in metrics
    assert {"routing.png", "expert_class.png", "load.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = VisionClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    assert again.backbone == backbone
    assert_close(again.eval()(images()), module.eval()(images()))


def test_each_block_may_have_a_layer_of_its_own_and_a_model_without_mlps_trains_dense(caplog):
    layers = core.moe_layers(build(moe=[MOE, core.MoEConfig(8, expert=core.SwiGLU(hidden_dim=8))], moe_blocks="all"))
    assert [layer.num_experts for layer in layers.values()] == [4, 8]
    assert not core.moe_layers(build(TimmConfig("resnet10t"), image_size=32))
    assert "resnet10t has no MLP that experts could replace: it trains dense" in caplog.text


def test_what_does_not_fit_is_refused_by_name():
    refused(
        r"'convnext_ato' is no model of timm; the nearest are convnext_atto, (\w+, ){3}\w+$", TimmConfig, "convnext_ato"
    )
    refused(r"backbone\.args has img_size", TimmConfig, "convnext_atto", args={"img_size": 8})
    refused(r"backbone\.pretrained='gone\.pt' is no file", TimmConfig, "convnext_atto", "gone.pt")
    refused("conv does not go with backbone|backbone does not go with conv", build, conv=ConvConfig())
    refused("share_experts does not go with backbone", build, share_experts=True)
    refused("moe lists 2 layers for 1 sparse blocks", build, moe=[MOE, MOE])
    refused("router Task.* needs context.task_ids_B", build, moe=core.MoEConfig(4, core.Task(num_tasks=2)))
    sizes = {"image_size": 30, "in_chans": 1, "num_classes": 2}
    swin = TimmConfig("vit_tiny_patch16_224", args={"depth": "two"})
    refused(
        "backbone vit_tiny_patch16_224 cannot be built for image_size=30", build_backbone, swin, None, "last1", **sizes
    )
