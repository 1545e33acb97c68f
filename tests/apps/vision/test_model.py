"""VMoE is timm's VisionTransformer wherever it is dense, and core's layer wherever it is not."""

import copy
import dataclasses
import math

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

import core
from apps.vision.model import VARIANTS, MoEBlock, ViTConfig, VMoE
from apps.vision.pretrained import load_pretrained_weights

# 8x8 images, patches of 2: a grid of 4x4, and 17 tokens with the class token.
TINY = ViTConfig(patch_size=2, embed_dim=16, depth=4, num_heads=2)
MOE = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=24))


def build(vit=TINY, moe=None, blocks="last2", hidden=None, *, image_size=8, in_chans=1, num_classes=10, seed=0):
    torch.manual_seed(seed)
    sizes = {"image_size": image_size, "in_chans": in_chans, "num_classes": num_classes}
    return VMoE(vit, **sizes, ffn=core.DenseFFN(hidden) if hidden else moe, moe_blocks=blocks)


def images(n=3, chans=1, size=8):
    return torch.randn(n, chans, size, size, generator=torch.Generator().manual_seed(1))


def numel(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_dense_is_timms_model_weight_by_weight_and_in_its_output(pool):
    ours = build(dataclasses.replace(TINY, pool=pool, init_values=0.1, qk_norm=True))
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 4}
    kind = {"global_pool": pool, "class_token": pool == "token", "init_values": 0.1, "qk_norm": True}
    twin = VisionTransformer(**sizes, num_heads=2, **kind)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    for name, weight in twin.state_dict().items():
        assert_close(ours.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    assert_close(ours(images()), twin(images()), rtol=0, atol=0)


def test_explicit_attention_and_timms_other_calls_are_the_same():
    fused, explicit = (build(dataclasses.replace(TINY, fused_attn=f)) for f in (True, False))
    assert_close(explicit(images()), fused(images()))
    # Two products of 17 x 17 x 16 in each of the 4 blocks, counted either way.
    assert core.count_flops(fused, images(1)) == core.count_flops(explicit, images(1))
    model = build(moe=MOE).eval()
    features, middle = model.forward_intermediates(images(), indices=2, norm=True)
    assert_close(features, model.forward_features(images()))
    assert [m.shape for m in middle] == [(3, 16, 4, 4)] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_sizes_are_timms(variant):
    dim, depth, heads = VARIANTS[variant]
    vit = ViTConfig(variant=variant)
    assert (vit.dim, vit.num_blocks, vit.heads, vit.dense_hidden_dim) == (dim, depth, heads, 4 * dim)
    assert ViTConfig(variant=variant, depth=2).num_blocks == 2
    if variant != "nano":
        import timm

        with torch.device("meta"):
            reference = timm.create_model(f"vit_{variant}_patch16_224")
        assert (reference.embed_dim, len(reference.blocks), reference.blocks[0].attn.num_heads) == (dim, depth, heads)


def test_an_expert_that_is_the_ffn_gives_the_dense_output():
    # One expert, taken by every token with gate softmax over one logit = 1.
    moe = core.MoEConfig(1, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=64, bias=True))
    dense, sparse = build().eval(), build(moe=moe).eval()
    weights = dense.state_dict()
    for i in sparse.moe_blocks:
        mlp = {n: weights.pop(f"blocks.{i}.mlp.{n}") for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
        weights[f"blocks.{i}.mlp.experts.w_in"] = mlp["fc1.weight"].t()[None]
        weights[f"blocks.{i}.mlp.experts.w_out"] = mlp["fc2.weight"].t()[None]
        weights[f"blocks.{i}.mlp.experts.b_in"] = mlp["fc1.bias"][None]
        weights[f"blocks.{i}.mlp.experts.b_out"] = mlp["fc2.bias"][None]
        weights[f"blocks.{i}.mlp.router.gate.weight"] = torch.randn(1, 16)
    sparse.load_state_dict(weights)
    assert_close(sparse(images()), dense(images()))


def test_moe_blocks_alone_are_widened_by_the_experts_numbers():
    # FFN: 2 * 16 * 64 + 64 + 16 = 2128. MoE: gate 4 * 16 = 64, experts 4 * 2 * 16 * 24 = 3072.
    dense, sparse = build().eval(), build(moe=MOE).eval()
    assert (MOE.num_params(16), numel(sparse)) == (64 + 3072, numel(dense) + 2 * (3136 - 2128))
    # A token takes two of the four experts.
    assert core.active_params(sparse) == numel(dense) + 2 * (64 + 3072 // 2 - 2128)
    # 17 tokens, two blocks. FFN: 4 * 16 * 64 = 4096 a token. Router: 2 * 16 * 4 = 128. An expert: 4 * 16 * 24 = 1536.
    assert MOE.flops_per_token(16) == 128 + 2 * 1536
    with torch.no_grad():
        assert core.count_flops(sparse, images(2)) - core.count_flops(dense, images(2)) == 2 * 17 * 2 * (3200 - 4096)
    model = build(dataclasses.replace(TINY, hidden_dim=40), hidden=100)
    assert [b.mlp.fc1.out_features for b in model.blocks] == [40, 100, 40, 100]
    assert all(isinstance(b, MoEBlock) for b in model.blocks)
    # timm's int(dim * mlp_ratio), with 56 * (61 / 56) just below 61.
    assert int(56 * (61 / 56)) == 60
    vit = ViTConfig(patch_size=2, embed_dim=56, depth=2, num_heads=2, hidden_dim=61)
    assert build(vit, blocks="last1").blocks[0].mlp.fc1.out_features == 61


def test_token_ids_are_patch_positions_also_of_patches_that_are_left():
    model, x = build(moe=MOE).eval(), images(4)
    with core.record(model) as tape:
        y = model(x)
    assert [e.name for e in tape.entries] == ["blocks.1.mlp", "blocks.3.mlp"]
    for entry in tape.entries:
        assert entry.context.token_ids_BS.tolist() == [list(range(17))] * 4
    assert_close(y[:1], model(x[:1]))
    model = build(dataclasses.replace(TINY, patch_drop=0.5, reg_tokens=1), MOE).train()
    with core.record(model) as tape:
        model(images(2))
    first, second = tape.entries[0].context.token_ids_BS.tolist()
    for ids in (first, second):  # class and register token, and 8 of the 16 patches, which are 2 .. 17
        assert (ids[:2], len(set(ids))) == ([0, 1], 10)
        assert set(ids[2:]) <= set(range(2, 18))
    assert first != second
    with core.record(model.eval()) as tape:
        model(images(2))
    assert tape.entries[0].context.token_ids_BS.shape == (2, 18)


def test_checkpointing_gives_the_same_gradients_and_counts_no_pass_twice():
    x, runs = images(2), []
    for recompute in (False, True):
        model = build(moe=MOE).train()
        model.set_grad_checkpointing(recompute)
        with core.record(model) as tape:
            loss = model(x).square().mean()
        (loss + core.aux_loss(tape)).backward()
        runs.append(({n: p.grad for n, p in model.named_parameters()}, len(tape)))
    (plain, passes), (again, passes_again) = runs
    assert passes == passes_again == 2
    for name, grad in plain.items():
        assert grad is not None, name
        assert_close(again[name], grad, msg=name)


def test_experts_start_like_the_dense_ffn_and_positions_at_the_given_scale():
    vit = ViTConfig(patch_size=2, embed_dim=64, depth=2, num_heads=2)
    experts = build(vit, core.MoEConfig(4, expert=core.FFN(bias=True)), blocks=[1]).blocks[1].mlp.experts
    dense = build(vit).blocks[1].mlp
    # Both are cut normals of deviation 0.02; nn.Linear's default would be 1 / sqrt(3 * 64) = 0.072.
    for weight in (*experts.w_in, *experts.w_out, dense.fc1.weight, dense.fc2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.cat((experts.b_in, experts.b_out), -1).any()
    w_in = build(dataclasses.replace(TINY, depth=2, weight_init="jax"), MOE, blocks=[1]).blocks[1].mlp.experts.w_in
    bound = math.sqrt(6 / (16 + 24))  # Glorot's, of each expert and not of the stack
    assert 0.9 * bound < float(w_in.detach().abs().max()) <= bound
    plain, loud = (ViTConfig(patch_size=4, depth=1, pos_embed_std=std) for std in (0.02, 0.5))
    faint, model = (build(vit, blocks=[0], image_size=28, num_classes=3) for vit in (plain, loud))
    # 49 patches and a class token, 96 channels: the deviation of 4800 normal numbers is off by 1 % (1 / sqrt(2 n)).
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.05)
    assert_close(model.pos_embed, 25 * faint.pos_embed)
    # Nothing else changes, and starting anew keeps the scale.
    for name, weight in faint.named_parameters():
        assert name == "pos_embed" or torch.equal(weight, model.get_parameter(name)), name
    model.init_weights()
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_convolutional_stem_has_a_token_for_each_patch_that_its_halvings_leave():
    model = build(dataclasses.replace(TINY, patch_size=4, stem="convolutions"), image_size=16).eval()
    first, second = (layer.conv for layer in model.patch_embed.backbone)
    norm = model.patch_embed.backbone[0].bn
    torch.nn.init.normal_(norm.running_mean)
    x = images(size=16)
    h = nn.functional.conv2d(x, first.weight, None, 2, 1) - norm.running_mean[:, None, None]
    h = nn.functional.conv2d(torch.relu(h / (1 + norm.eps) ** 0.5), second.weight, second.bias, 2, 1)
    assert model.patch_embed.grid_size == h.shape[-2:] == (4, 4)
    assert_close(model.patch_embed(x), h.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ViTConfig(embed_dim=10, num_heads=3), "embed_dim=10 is not divisible by num_heads=3"),
    (lambda: ViTConfig(pool="token", class_token=False), "pool='token' needs class_token=True"),
    (lambda: ViTConfig(patch_size=6, stem="convolutions"), "patch_size=6 with stem='convolutions', which halve"),
    (lambda: build(ViTConfig(patch_size=3)), "image_size=8 is not divisible by patch_size=3"),
    (lambda: build(in_chans=0), "in_chans=0 must be at least 1"),
    (lambda: VMoE(TINY, image_size=8, in_chans=1, num_classes=2, ffn=core.DenseFFN(gated=True)),
     "dense_ffn.gated=True does not fit a vision transformer"),
])  # fmt: skip
def test_refused_combinations_are_one_line(make, message):
    refused(message, make)


@pytest.fixture
def source():
    """A dense model of other patches, channels and classes: 12x12 colour images, patches of 4, 5 classes."""
    return build(dataclasses.replace(TINY, patch_size=4), image_size=12, in_chans=3, num_classes=5, seed=3)


def as_lightning(weights, path):
    """Save weights as Lightning does those of a VisionClassifier."""
    torch.save({"state_dict": {f"model.{n}": w for n, w in weights.items()}, "epoch": 3}, path)


@pytest.mark.parametrize("save, name", [(save_file, "w.safetensors"), (torch.save, "w.pt"), (as_lightning, "w.ckpt")])
def test_dense_parts_load_and_the_rest_is_named(source, tmp_path, save, name, caplog):
    model, path = build(moe=MOE), tmp_path / name
    save(source.state_dict(), path)
    before = copy.deepcopy(model.state_dict())
    caplog.set_level("INFO", logger="apps.vision.pretrained")
    report = load_pretrained_weights(model, path)
    assert_close(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert_close(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    # Position embeddings of 3x3 patches became those of 4x4, patches of 4x4x3 pixels 2x2x1.
    assert {"pos_embed", "patch_embed.proj.weight"} <= set(report.loaded)
    assert not torch.equal(model.pos_embed, before["pos_embed"])
    assert_close(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert set(report.skipped) == {"head.weight", "head.bias"}
    assert len(report.replaced) == 2 * 3  # gate, w_in, w_out
    assert "2 of another shape, left untrained (head." in caplog.text
    assert "6 of MoE layers in place of an FFN, left untrained (blocks.1.mlp." in caplog.text
    for name in (*report.skipped, *report.replaced):
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert (report.missing, report.unexpected) == ((), ())
    (line,) = [r.getMessage() for r in caplog.records if r.name == "apps.vision.pretrained"]
    assert "\n" not in line
    assert f"{len(report.loaded)} loaded" in line


def timm_vit(**kwargs):
    """timm's own transformer of 2x2 patches on 8x8 grey images, with weights that are not all zeros and ones."""
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}
    torch.manual_seed(3)
    model = VisionTransformer(**{**options, "num_heads": 2, **kwargs})
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()


def loaded(weights, tmp_path, **vit):
    torch.save(weights, tmp_path / "w.pt")
    model = build(ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2, **vit), num_classes=3).eval()
    return model, load_pretrained_weights(model, tmp_path / "w.pt")


@pytest.mark.parametrize("class_token", [True, False])
def test_averaged_features_are_timm_s(tmp_path, class_token):
    source_model = timm_vit(global_pool="avg", class_token=class_token)
    model, report = loaded(source_model.state_dict(), tmp_path, pool="avg", class_token=class_token)
    assert (report.missing, report.unexpected, report.skipped) == ((),) * 3
    assert_close(model(images()), source_model(images()))


def test_weights_with_a_class_token_load_into_a_model_that_averages(tmp_path):
    source = timm_vit().state_dict()
    # timm's model without a class token, its weights put there by hand: the first position is the class token's.
    source_model = timm_vit(global_pool="avg", class_token=False)
    moved = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: w for n, w in source.items()}
    del moved["cls_token"]
    moved["pos_embed"] = source["pos_embed"][:, 1:]
    source_model.load_state_dict(moved)
    model, report = loaded(source, tmp_path, pool="avg")
    assert {"fc_norm.weight", "fc_norm.bias", "pos_embed"} <= set(report.loaded)
    assert (report.missing, report.unexpected, report.skipped) == ((),) * 3
    assert_close(model(images()), source_model(images()))


@pytest.mark.parametrize("registers", [0, 5])
@pytest.mark.parametrize("embedded", [True, False])
def test_positions_of_prefix_tokens_move_into_the_tokens_and_back(tmp_path, registers, embedded):
    source_model = timm_vit(reg_tokens=registers, no_embed_class=not embedded)
    model, _ = loaded(source_model.state_dict(), tmp_path, reg_tokens=registers, no_embed_class=embedded)
    assert_close(model(images()), source_model(images()))


@pytest.mark.parametrize(("source", "vit", "message"), [
    ({"pre_norm": True}, {}, "patch_embed.proj.bias is missing, norm_pre.weight, norm_pre.bias are unexpected"),
    ({"init_values": 0.1}, {}, "blocks.0.ls1.gamma, blocks.0.ls2.gamma, .* and 1 more are unexpected"),
    ({"depth": 1}, {}, "blocks.1.norm1.weight, blocks.1.norm1.bias, .* and .* more are missing"),
    ({"mlp_ratio": 2.0}, {}, "blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias, .* are of another shape"),
    ({"reg_tokens": 2}, {}, "reg_token is unexpected"),
    ({"class_token": False, "global_pool": "avg"}, {"pool": "token"}, "cls_token is missing"),
], ids=["pre_norm", "layer_scale", "depth", "ffn", "registers", "class_token"])  # fmt: skip
def test_weights_of_another_architecture_are_refused(tmp_path, source, vit, message):
    rule = rf"w\.pt is of another architecture than model\.vit: {message}"
    refused(rule, loaded, timm_vit(**source).state_dict(), tmp_path, **vit)


def test_heads_blocks_beyond_the_last_and_replaced_ffns_may_differ_and_a_sparse_checkpoint_loads_whole(tmp_path):
    torch.save(timm_vit(depth=4, num_classes=7).state_dict(), tmp_path / "w.pt")
    model = build(dataclasses.replace(TINY, depth=2), blocks=[1], hidden=24)
    report = load_pretrained_weights(model, tmp_path / "w.pt")
    assert {n.rpartition(".")[0] for n in report.skipped} == {"head", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    assert {n.split(".")[1] for n in report.unexpected} == {"2", "3"}
    trained, model = build(moe=MOE, seed=5), build(moe=MOE)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    report = load_pretrained_weights(model, tmp_path / "w.pt")
    assert (report.replaced, report.missing, report.unexpected, report.skipped) == ((),) * 4
    assert_close(model(images()), trained(images()))


# 9 embeddings: 2x2 patches with a class token and four registers, or 3x3 patches alone.
@pytest.mark.parametrize("size, embeds", [
    *(((4, 4), (True, True)), ((4, 4), (True, False)), ((4, 8), (True, True))),
    *(((6, 6), (False, False)), ((6, 6), (False, True)), ((6, 8), (False, False))),
])  # fmt: skip
def test_as_many_embeddings_as_another_square_are_taken_apart_right(tmp_path, size, embeds):
    source, model = (
        build(dataclasses.replace(TINY, reg_tokens=4, no_embed_class=not e), image_size=n, seed=n).eval()
        for e, n in zip(embeds, size, strict=True)
    )
    nn.init.normal_(source.cls_token)
    assert source.pos_embed.shape[1] == 9
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_pretrained_weights(model, tmp_path / "w.pt")
    tokens = [m.cls_token + (m.pos_embed[:, :1] if e else 0.0) for m, e in zip((source, model), embeds, strict=True)]
    assert_close(*tokens)
    if size[0] == size[1]:
        x_BCHW = torch.randn(2, 1, size[0], size[0])
        assert_close(model(x_BCHW), source(x_BCHW))


def test_weights_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:-40])
    for bad, message in (
        (tmp_path / "cut.pt", "cut.pt cannot be read: PytorchStreamReader failed[^.]*$"),
        (tmp_path / "w.safetensors", "cannot be read"),
        (tmp_path / "other.pt", "none of its 1 tensors fits"),
        ("vit_tinny_patch16_224", "is neither a file nor a timm model"),
        (tmp_path / "gone.pt", "is neither a file nor a timm model"),
    ):
        refused(f"pretrained=.*{message}", load_pretrained_weights, build(), bad)
