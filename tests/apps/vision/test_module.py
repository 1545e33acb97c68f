"""VisionClassifier: its loss, its baselines, and a run through Lightning."""

import dataclasses
import json
import math
import pickle

import pytest
import torch
from made_images import write_images
from quiet_trainer import quiet_trainer
from refusals import refused
from taught import divergence, kl, saved, taught
from torch.testing import assert_close

import core
from apps.cli import main
from apps.equal_cost import routers
from apps.train.cost.flops import measure_cost
from apps.train.optim.optimizers import OptimizerConfig, parameter_groups
from apps.train.step.distilling import DistilConfig
from apps.vision.batch import ImageBatch
from apps.vision.conv import ConvConfig
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier
from core.routing.pairs.expert_choice import ExpertChoice
from core.routing.soft.soft import Merge, SoftSlots

TINY = ViTConfig(patch_size=2, embed_dim=8, depth=2, num_heads=2, pool="avg")
MOE = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))


def build(moe=MOE, **kwargs):
    torch.manual_seed(0)
    options = {"vit": TINY, "moe": moe, "moe_blocks": [1], "image_size": 8, "report": None}
    return VisionClassifier(**{**options, **kwargs})


def batch(n=4, label=None):
    image = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return ImageBatch(image, torch.arange(n) if label is None else label, torch.arange(n))


def test_the_values_by_example_are_the_accuracy_and_metrics_are_top1_and_top5():
    module, label = build(num_classes=3).eval(), torch.tensor([0, 1, 2, 0, 1])
    outs, top1 = [module.task_loss(batch(5, label)), module.task_loss(batch(2))], module.build_metrics()
    for out in outs:
        top1.update(out.outputs, out.targets)
    values = module.comparison.example_values(outs)
    assert (values.values_N.shape, values.mean) == ((7,), pytest.approx(float(top1.compute()["top1"]), rel=1e-6))
    metrics = build().build_metrics()
    logits = torch.eye(10)[:4]  # guesses 0, 1, 2, 3; beyond the first, ties go to the lower classes
    values = metrics(logits + torch.linspace(0.09, 0, 10), torch.tensor([0, 1, 9, 4]))
    assert float(values["top1"]) == 0.5
    # The fourth image's 4 is among its five best, 3, 0, 1, 2, 4; the third one's 9 is not.
    assert float(values["top5"]) == 0.75
    assert "top5" not in build(num_classes=5).build_metrics()


def test_a_dense_model_learns_the_classes_of_a_sparse_one(tmp_path):
    teacher = build(num_classes=3).eval()
    with torch.no_grad():
        teacher.model.head.weight.mul_(20.0)  # it is sure of some classes
    module = build(None, num_classes=3, distil=DistilConfig(saved(teacher, tmp_path / "t.ckpt"), 0.5, copy=True))
    one = batch(4, torch.tensor([0, 1, 2, 0]))
    with torch.no_grad():
        soft = kl(teacher(one.image), module(one.image), 2.0).float()
    assert_close(divergence(module, teacher, one, 2.0).detach(), soft, rtol=1e-4, atol=0)
    loss, out, *_ = taught(module).training_loss(one)
    assert torch.equal(module.model.head.weight, teacher.model.head.weight)
    half = (out.terms["label_loss"] + out.terms["teacher_loss"]) / 2
    assert_close(loss.detach(), half)
    refused("its num_classes is 3, and this run's is 4", taught, build(None, num_classes=4, distil=module.distil))
    refused(r"pretrained='vit' with distil\.copy=True", build, None, pretrained="vit", distil=module.distil)


def constant(module, values):
    """Make ``module`` answer every image with the logits ``values``."""
    head = module.model.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor(values))
    return module


def test_labels_are_smoothed_in_training_alone_and_predictions_list_the_likeliest_classes():
    # Three classes, logits log(2), 0, 0: probabilities 1/2, 1/4, 1/4. The target is class 0.
    # Plain: -log(1/2) = 0.693. Smoothed by 0.3: targets 0.8, 0.1, 0.1: 0.8 * 0.693 + 0.2 * 1.386 = 0.832.
    module = constant(build(None, num_classes=3, label_smoothing=0.3), [math.log(2.0), 0.0, 0.0])
    one = batch(1, torch.tensor([0]))
    assert float(module.train().task_loss(one).loss.detach()) == pytest.approx(0.8318, abs=1e-4)
    assert float(module.eval().task_loss(one).loss.detach()) == pytest.approx(0.6931, abs=1e-4)
    module = constant(build(None, num_classes=3), [math.log(2.0), 0.0, 0.0])
    # 0.3 of class 0 (0.693) and 0.7 of class 2 (1.386): 0.208 + 0.970.
    out = module.task_loss(batch(1, torch.tensor([[0.3, 0.0, 0.7]])))
    assert (float(out.loss.detach()), out.targets.tolist()) == (pytest.approx(1.1783, abs=1e-4), [2])
    assert out.num_examples == 1
    module = constant(build(None, num_classes=3), [0.0, math.log(2.0), math.log(5.0)])
    prediction = module.predict_step(batch(2), 0)
    assert prediction.label.tolist() == [[2, 1, 0]] * 2
    assert_close(prediction.probability[0], torch.tensor([5.0, 2.0, 1.0]) / 8)
    assert prediction.index.tolist() == [0, 1]


def test_pretrained_weights_are_where_a_model_begins_and_data_must_have_its_shape(tmp_path):
    source = build(None, moe_blocks=[1])
    torch.save(source.model.state_dict(), tmp_path / "w.pt")
    module = build(pretrained=str(tmp_path / "w.pt"))
    torch.nn.init.zeros_(module.model.blocks[0].attn.qkv.weight)
    module.setup("fit")
    assert_close(module.model.blocks[0].attn.qkv.weight, source.model.blocks[0].attn.qkv.weight)
    refused(r"pretrained='gone\.pt' is neither a file nor a timm model", build(pretrained="gone.pt").setup, "fit")
    module = build(image_size=12)
    with pytest.raises(ValueError, match=r"model\.image_size=12 does not fit the data, whose image_size is 8"):
        quiet_trainer(tmp_path, fast_dev_run=True).fit(module, datamodule=VisionData("digits"))


def test_a_trained_model_needs_its_pretrained_weights_no_more(tmp_path, capsys):
    source = tmp_path / "w.pt"
    torch.save(build(None).model.state_dict(), source)
    small = {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "pool": "avg"}
    model = {"class_path": "VisionClassifier", "init_args": {"vit": small, "pretrained": str(source), "report": None}}
    trainer = {"accelerator": "cpu", "limit_train_batches": 1, "limit_val_batches": 1, "logger": False}
    (tmp_path / "c.yaml").write_text(json.dumps({"model": model, "data": "VisionData", "trainer": trainer}))
    argv = ["--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path / "run"), "--trainer.max_epochs"]
    assert main(["fit", *argv, "1"]) == 0
    assert "pretrained" in capsys.readouterr().err
    source.unlink()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["fit", *argv, "2", "--ckpt_path", "last"]) == 0
    kept = torch.load(last)
    assert (kept["epoch"], kept["hyper_parameters"]["pretrained"]) == (1, str(source))
    again = VisionClassifier.load_from_checkpoint(last)
    again.setup("test")
    assert_close(again.state_dict(), kept["state_dict"])
    capsys.readouterr()
    assert main(["fit", *argv, "1"]) == 1
    assert "is neither a file nor a timm model" in capsys.readouterr().err


def test_predictions_name_files_and_classes(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path, split, 2, classes=("cat", "dog"))
    small = {"vit": {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}}
    folder = {"dataset": "image_folder", "root": str(tmp_path), "image_size": 8}
    config = {
        "model": {"class_path": "VisionClassifier", "init_args": small},
        "data": {"class_path": "VisionData", "init_args": folder},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    argv = ["predict", "--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path / "run"), "--ckpt_path", "none"]
    dogs = ["--overwrite", "--data.predict_folder", str(tmp_path / "train" / "dog")]
    for more, folders in (([], ("test/cat", "test/dog")), (dogs, ("train/dog",))):
        assert main([*argv, *more]) == 0
        rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
        files = [str(tmp_path / f"{name}/{i}.png") for name in folders for i in range(2)]
        assert [(row["index"], row["path"]) for row in rows] == [*enumerate(files)]
        assert all(row["class_name"] == [("cat", "dog")[c] for c in row["label"]] for row in rows)


def test_baselines_cost_what_they_say_in_moe_blocks_and_elsewhere_the_same():
    # D = 8, E = 4, K = 2, F = 16. FLOPs a token: router 2*8*4 = 64, experts 2 * 4*8*16 = 1024; 1088 / (4*8) = 34.
    # Parameters: router 32, experts 4 * 2*8*16 = 1024; 2*8*F + F + 8 = 1056 gives F = 61.6.
    sparse = build()
    baselines = sparse.comparison.baselines()
    assert list(baselines) == ["dense_equal_flops", "dense_equal_params"]
    flops, params = (baselines[n].build() for n in baselines)
    assert [m.model.blocks[1].mlp.fc1.out_features for m in (flops, params)] == [34, 62]
    x, layer = torch.randn(2, 16, 8), sparse.model.blocks[1].mlp
    with torch.no_grad():
        assert core.count_flops(layer, x) == 2 * 16 * 1088
        assert core.count_flops(flops.model.blocks[1].mlp, x) == 2 * 16 * 1088
    sizes = [sum(p.numel() for p in m.parameters()) for m in (layer, params.model.blocks[1].mlp)]
    assert sizes == [1056, 1062]  # 0.6 % more
    for dense in (flops, params):
        assert not core.moe_layers(dense)
        assert (dense.comparison.baselines(), dense.model.blocks[0].mlp.fc1.out_features) == ({}, 32)
        assert dense.optimizer_config == sparse.optimizer_config
    assert "FFN hidden dim 34 in place of experts, 32 elsewhere" in baselines["dense_equal_flops"].note
    make = pickle.loads(pickle.dumps(baselines["dense_equal_flops"].build))  # as it travels to another process
    assert make().model.blocks[1].mlp.fc1.out_features == 34


def test_each_sparse_block_may_have_a_layer_of_its_own(tmp_path):
    pyramid = [MOE, dataclasses.replace(MOE, num_experts=8)]
    sparse = build(pyramid, moe_blocks="all")
    assert [layer.num_experts for layer in core.moe_layers(sparse).values()] == [4, 8]
    # FLOPs a token: 2*8*4 = 64 and 2*8*8 = 128 of the gates, 1024 each of the experts: 1120 in the mean, 4*8 * 35.
    # Parameters: 1056 and 64 + 8 * 2*8*16 = 2112: 1584 in the mean; 2*8*F + F + 8 = 1584 gives F = 92.7.
    assert sparse.comparison.heading == "sparse"
    twins = [baseline.build() for baseline in sparse.comparison.baselines().values()]
    assert [[block.mlp.fc1.out_features for block in twin.model.blocks] for twin in twins] == [[35, 35], [93, 93]]
    rule = r"^--routers hash: moe lists 2 layers; routers are compared where all"
    refused(rule, routers.variants, sparse.comparison, ["hash"])
    refused(r"^moe lists 2 layers for 1 sparse blocks, \[1\]: it needs one each$", build, pyramid)
    fit = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=1, num_sanity_val_steps=0)
    fit.fit(sparse, datamodule=VisionData("digits", batch_size=8, subset=32, seed=0))
    fit.save_checkpoint(tmp_path / "m.ckpt")
    again = VisionClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    assert again.moe == pyramid
    assert_close(again.eval()(batch().image), sparse.eval()(batch().image))


@pytest.mark.parametrize("router", [SoftSlots(2), Merge("smear"), ExpertChoice(1.5)], ids=str)
def test_layers_that_cost_by_the_image_have_baselines_of_equal_flops(router):
    sparse = build(core.MoEConfig(num_experts=4, router=router, expert=core.FFN(hidden_dim=16)))
    dense = sparse.comparison.baselines()["dense_equal_flops"].build()
    x = torch.randn(2, 16, 8)  # 8 / 2 patches a side, no class token
    with torch.no_grad():
        sparse_flops, dense_flops = (core.count_flops(m.model.blocks[1].mlp, x) for m in (sparse, dense))
    assert dense_flops == pytest.approx(sparse_flops, rel=0.03)  # half of 4 * 8 FLOPs over at least 600


def test_a_baseline_that_is_another_or_cannot_exist_is_not_built():
    # With K = E every token takes every expert. FLOPs: 2*8*2 + 2 * 4*8*256 = 16416 = 4*8 * 513.
    # Parameters: 2*8 + 2 * (2*8*256 + 256 + 8) = 8736 = 17 * 513.4 + 8.
    same = build(core.MoEConfig(num_experts=2, expert=core.FFN(hidden_dim=256, bias=True))).comparison.baselines()
    assert same["dense_equal_flops"].build is not None
    assert same["dense_equal_params"].build is None
    assert "coincides with dense_equal_flops" in same["dense_equal_params"].note
    # 2*8*3 + 4*8*1 = 80 FLOPs = 4*8 * 2.5, and neither 2 nor 3 is within 5 % of it.
    tiny = core.MoEConfig(num_experts=3, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=1))
    baseline = build(tiny).comparison.baselines()["dense_equal_flops"]
    assert (baseline.build, baseline.note) == (None, "no whole width comes within 5% of 80 flops")


@pytest.mark.parametrize(("options", "message"), [
    ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is not in \[0, 1\)"),
    ({"num_classes": 1}, "num_classes=1 must be at least 2"),
    ({"moe_blocks": [2]}, "moe_blocks index 2 is out of range for depth=2"),
    ({"image_size": 9}, "image_size=9 is not divisible by patch_size=2"),
])  # fmt: skip
def test_refused_options(options, message):
    refused(message, build, **options)


def test_parameter_groups_know_routers_experts_and_what_does_not_decay():
    module = build(core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16, bias=True)))
    names = {id(p): n for n, p in module.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(module, OptimizerConfig())}
    layer = "model.blocks.1.mlp"
    assert groups["router"] == {f"{layer}.router.gate.weight"}
    assert groups["experts"] == {f"{layer}.experts.w_in", f"{layer}.experts.w_out"}
    assert groups["experts_no_decay"] == {f"{layer}.experts.b_in", f"{layer}.experts.b_out"}
    assert "model.pos_embed" in groups["rest_no_decay"]


def test_it_learns_and_its_checkpoint_loads_with_plain_values(tmp_path):
    data = VisionData("digits", batch_size=32, subset=512, seed=0, mixup_alpha=0.2)
    module = build(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0.0), ema_decay=0.9, label_smoothing=0.1)
    assert (module.model.grad_checkpointing, build(grad_checkpointing=True).model.grad_checkpointing) == (False, True)
    fit = quiet_trainer(tmp_path, max_epochs=6, log_every_n_steps=1, num_sanity_val_steps=0)
    start = module.task_loss(next(iter(data.test_dataloader()))).loss.detach()
    fit.fit(module, datamodule=data)
    assert fit.callback_metrics["val/top1"] > 0.2  # guessing gets 0.1
    assert fit.callback_metrics["val/loss"] < start
    assert {"train/load_balancing_loss", "train/router_z_loss", "train/aux_loss"} <= fit.logged_metrics.keys()
    measures = ("load_imbalance", "entropy", "drop_rate", "dead_experts")
    assert {f"val/routing/model.blocks.1.mlp/{measure}" for measure in measures} <= fit.callback_metrics.keys()
    fit.save_checkpoint(tmp_path / "m.ckpt")
    assert torch.load(tmp_path / "m.ckpt", weights_only=True)["hyper_parameters"]["moe"]["num_experts"] == 4
    again = VisionClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    assert (again.moe, again.vit, again.optimizer_config.lr) == (MOE, TINY, 1e-2)
    x = batch().image
    assert_close(again.eval()(x), module.eval()(x))


def test_flip_at_test_is_the_mean_over_an_image_and_its_mirror_image_outside_training():
    plain = VisionClassifier(conv=ConvConfig((4, 8), 1), image_size=8, num_classes=3)
    flipped = VisionClassifier(conv=ConvConfig((4, 8), 1), image_size=8, num_classes=3, flip_at_test=True)
    flipped.load_state_dict(plain.state_dict())
    x = torch.randn(5, 1, 8, 8)
    for module in (plain, flipped):
        module.eval()
    assert_close(flipped(x), (plain(x) + plain(x.flip(3))) / 2)
    for module in (plain, flipped):
        module.train()
    assert_close(flipped(x), plain(x))


def test_the_flops_of_training_have_no_mirror_image_and_those_of_an_evaluation_do():
    own = {"conv": ConvConfig((4, 8), 1), "image_size": 8, "num_classes": 3}
    images = ImageBatch(torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    plain, flipped = VisionClassifier(**own), VisionClassifier(**own, flip_at_test=True)
    once = measure_cost(plain, images).flops_per_example
    assert measure_cost(flipped, images).flops_per_example == once
    assert measure_cost(flipped, images, as_evaluated=True).flops_per_example == 2 * once
    assert flipped.flip_at_test
