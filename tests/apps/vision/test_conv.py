"""ConvNet computes what its functional form does, with a layer of core's at each position of a group's output."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from made_images import ready
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

import core
from apps.serve.export.programs import capture
from apps.train.publish.exporting import Graph
from apps.vision.conv import ConvConfig, ConvNet
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

TINY = ConvConfig(widths=(4, 6), stem_stride=1)
MOE = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))


def build(moe=MOE, conv=TINY, **kwargs):
    torch.manual_seed(0)
    options = {"conv": conv, "moe": moe, "moe_blocks": [-1], "image_size": 8, "report": None}
    return VisionClassifier(**{**options, **kwargs})


def images(n=3, size=8):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def test_it_computes_convolutions_pools_norms_and_an_expert_layer_a_position():
    torch.manual_seed(0)
    net = ConvNet(ConvConfig((4, 6), 2), image_size=8, in_chans=1, num_classes=3, ffn=MOE).eval()
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    state = net.state_dict()

    def conv(x, name, stride=1, pool=False):
        x = F.conv2d(x, state[f"{name}.0.weight"], None, stride, 1)
        x = F.max_pool2d(x, 2) if pool else x
        norm = f"{name}.{1 + pool}"
        mean, var, scale, shift = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return F.gelu(x * scale[:, None, None] + shift[:, None, None])

    x = conv(images(), "stem", stride=2)
    x = conv(conv(x, "groups.0.convs.0"), "groups.0.convs.1")
    x = conv(conv(x, "groups.1.convs.0", pool=True), "groups.1.convs.1")
    assert x.shape == (3, 6, 2, 2)
    ffn = net.groups[1].ffn
    y = x.clone()
    for row in range(2):
        for column in range(2):
            tokens_BSD = ffn.norm(x[:, :, row, column])[:, None]
            y[:, :, row, column] += ffn.mlp(tokens_BSD)[:, 0]
    assert_close(net.forward_features(images()), y)
    assert_close(net(images()), net.head(net.norm(y.amax((2, 3)))))
    assert_close(net.forward_head(y, pre_logits=True), net.norm(y.amax((2, 3))))
    assert ConvNet(TINY, image_size=8, in_chans=1, num_classes=0)(images()).shape == (3, 6)


def test_routers_know_the_positions_and_what_is_said_of_the_images():
    seen = []
    net = build().model
    layer = net.groups[1].ffn.mlp
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    domains = torch.tensor([0, 1, 0])
    net(images(), core.RoutingContext(domain_ids_B=domains))
    assert seen[0].token_ids_BS.tolist() == [list(range(16))] * 3  # 8x8 pooled once: 4x4, row by row
    assert torch.equal(seen[0].domain_ids_B, domains)


def test_the_default_has_the_size_and_the_flops_of_its_formula():
    module = VisionClassifier(conv=ConvConfig(), image_size=28)
    # 4x4 over 1 channel; then 24, 48 and 96 channels; two numbers a channel of each norm; the head.
    convs = 24 * 16 + 9 * (24 * 24 * 2 + 24 * 48 + 48 * 48 + 48 * 96 + 96 * 96)
    assert sum(p.numel() for p in module.parameters()) == convs + 2 * (24 + 2 * (24 + 48 + 96)) + 970
    # Each pooled group's first convolution is computed on the grid before the pool: 14, 14 and 7.
    grids = 24 * 16 * 14**2 + 9 * (
        24 * 24 * 2 * 14**2 + 24 * 48 * 14**2 + 48 * 48 * 7**2 + 48 * 96 * 7**2 + 96**2 * 3**2
    )
    assert core.count_flops(module.eval(), images(1, 28)) == 2 * (grids + 960)


def test_twins_cost_as_much_and_a_model_without_experts_has_no_ffn():
    sparse, x = build(moe_blocks="all"), images(2)
    # D = 6, E = 4, K = 2, F = 16: router 2*6*4 = 48, experts 2 * 4*6*16 = 768; 816 / (4*6) = 34.
    flops = sparse.comparison.baselines()["dense_equal_flops"].build()
    assert [group.ffn.mlp.w_in.weight.shape for group in flops.model.groups] == [(34, 4), (34, 6)]
    assert core.count_flops(flops, x) == core.count_flops(sparse, x)
    assert all(group.ffn is None for group in build(None).model.groups)
    assert sparse.comparison.tokens_per_image == 16
    assert build(moe_blocks=[0]).comparison.tokens_per_image == 64


def test_it_learns_survives_a_checkpoint_and_recomputes(tmp_path):
    module = build(conv=dataclasses.replace(TINY, widths=(16, 32)), ema_decay=0.9)
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=ready("digits", batch_size=64))
    assert float(trainer.callback_metrics["val/top1"]) > 0.8
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = VisionClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    assert again.conv == module.conv
    assert_close(again.eval()(images()), module.eval()(images()))
    twins = [build(grad_checkpointing=recomputes).train() for recomputes in (False, True)]
    for twin in twins:
        twin(images()).square().sum().backward()
    for one, other in zip(*(twin.parameters() for twin in twins), strict=True):
        assert_close(one.grad, other.grad)


def test_it_is_exported_for_batches_of_any_size():
    net = build().eval().model
    program = capture(Graph("model", net, {"x": images(3)}, ("logits",), {"x": {0: "batch"}}))
    assert_close(program.module()(images(5)), net(images(5)))


def test_what_does_not_fit_is_refused_by_name():
    refused("vit does not go with conv: leave one of them out", build, vit=ViTConfig())
    refused("pretrained does not go with conv: leave one of them out", build, pretrained="vit_tiny_patch16_224")
    refused(
        "image_size=2 is too small for conv, whose groups need 4 pixels", build, conv=ConvConfig((4, 6)), image_size=2
    )
    refused(r"conv\.widths=\(\) has no group", ConvConfig, ())
    refused(r"share_experts=True needs groups of one width, not conv\.widths=\[4, 6\]", build, share_experts=True)
    shared = build(conv=ConvConfig((6, 6), 1), moe_blocks="all", share_experts=True).model
    assert shared.groups[0].ffn.mlp.experts is shared.groups[1].ffn.mlp.experts
    with pytest.raises(ValueError, match="is out of range for depth=2"):
        build(moe_blocks=[2])
