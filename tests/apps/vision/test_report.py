"""Few-shot evaluation, the capacity sweep, and counts of who goes where, on numbers one can check."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.testing import assert_close

import core
from apps.cli import main
from apps.data.loader import batches_of_test
from apps.report import plots
from apps.vision.data import ImageBatch, VisionData
from apps.vision.model import ViTConfig, VMoE
from apps.vision.module import VisionClassifier
from apps.vision.report import (
    CapacityPoint,
    FewShotResult,
    ReportConfig,
    VisionReport,
    _limited,
    block_name,
    capacity_sweep,
    class_share,
    draw_shots,
    expert_class_counts,
    extract_features,
    few_shot,
    linear_accuracy,
    sweep_picture,
)

# ---- few-shot


def clusters(per_class, spread, seed=0):
    """Three classes around the corners of a triangle in 4 dimensions, of which 2 are noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centres = np.array([[3, 0, 0, 0], [-3, 0, 0, 0], [0, 3, 0, 0]], dtype=float)
    return centres[labels] + spread * rng.standard_normal((len(labels), 4)), labels


def test_shots_are_drawn_class_by_class_and_by_seed():
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 2, 2])
    drawn = draw_shots(labels, 2, seed=0)
    assert labels[drawn].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(drawn.tolist())) == 6
    assert draw_shots(labels, 2, seed=0).tolist() == drawn.tolist()
    assert any(draw_shots(labels, 2, seed=s).tolist() != drawn.tolist() for s in (1, 2, 3))
    with pytest.raises(ValueError, match="3-shot evaluation needs 3 images a class: class 2 has 2"):
        draw_shots(labels, 3, seed=0)


def test_linear_accuracy_is_1_where_a_plane_divides_and_chance_where_nothing_does():
    support, test = clusters(10, 0.3), clusters(100, 0.3, seed=1)
    assert linear_accuracy(*support, *test) == 1.0
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((30, 4)), np.repeat(np.arange(3), 10)
    assert linear_accuracy(*noise, rng.standard_normal((3000, 4)), np.repeat(np.arange(3), 1000)) < 0.5


def test_more_shots_help_and_features_may_be_of_any_scale():
    features, labels = clusters(100, 2.0)
    features = features * [1e4, 1e-4, 1.0, 1.0]
    test = clusters(300, 2.0, seed=1)
    five, fifty = few_shot(features, labels, test[0] * [1e4, 1e-4, 1.0, 1.0], test[1], shots=(2, 50), num_seeds=6)
    assert fifty.mean > five.mean
    assert fifty.interval < five.interval


def test_interval_is_students():
    # Accuracies 0.5, 0.6, 0.7: mean 0.6, deviation 0.1, t(0.975, 2) = 4.303: 4.303 * 0.1 / sqrt(3) = 0.248.
    result = FewShotResult(5, (0.5, 0.6, 0.7))
    assert result.mean == pytest.approx(0.6)
    assert result.interval == pytest.approx(0.2484, abs=1e-4)
    assert FewShotResult(5, (0.5,)).interval is None


# ---- who goes where


def routing(token, expert, gate, num_tokens, num_experts):
    """A routing of written-down pairs; expert ``num_experts`` computes none."""
    ids = torch.tensor(expert)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    return core.Routing(torch.tensor(token), ids, torch.tensor(gate), counts, counts, num_tokens)


def test_without_pairs_a_token_counts_for_the_expert_of_the_largest_share():
    # Two images of two tokens, the last token is padding.
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    tokens = torch.tensor([3, 3, 3])
    merged = core.contract.MergeRouting(
        weights, 2, 1, tokens, tokens, 4, valid_T=torch.tensor([True, True, True, False])
    )
    assert expert_class_counts(merged, torch.tensor([1, 0]), 2).tolist() == [[1, 0, 0], [0, 2, 0]]


def test_counts_by_class_leave_dropped_pairs_out():
    # Two images of two tokens, classes 1 and 0. Tokens 0, 1 are the first image's.
    r = routing([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 2, 1, 2, 1, 0], [0.5] * 8, 4, 2)
    counts = expert_class_counts(r, torch.tensor([1, 0]), num_classes=3)
    assert counts.tolist() == [[1, 2], [2, 1], [0, 0]]
    assert_close(class_share(counts), np.array([[1 / 3, 2 / 3], [2 / 3, 1 / 3], [0, 0]]), check_dtype=False)


def test_layers_are_named_by_block():
    assert block_name("blocks.3.mlp") == "block 3"
    assert block_name("model.blocks.11.mlp") == "block 11"
    assert block_name("encoder.ffn") == "encoder.ffn"


# ---- capacity sweep

# 8x8 images, patches of 4: 4 tokens without a class token.
VIT = ViTConfig(patch_size=4, embed_dim=8, depth=2, num_heads=2, pool="avg")
MOE = core.MoEConfig(num_experts=2, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=16))


def sparse(moe=MOE):
    torch.manual_seed(0)
    return VMoE(VIT, image_size=8, in_chans=1, num_classes=3, moe=moe, moe_blocks=[1]).eval()


def batches(n=2, size=8):
    draw = torch.Generator().manual_seed(1)
    return [
        ImageBatch(torch.randn(size, 1, 8, 8, generator=draw), torch.arange(size) % 3, torch.arange(size))
        for _ in range(n)
    ]


def test_sweep_counts_flops_of_the_pairs_computed():
    model = sparse()
    data = batches()
    points = capacity_sweep(model, lambda: data, (0.5, None), ("position", "score"))
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


def test_features_are_what_the_head_reads():
    model = sparse()
    data = batches(1)
    features, labels = extract_features(model, data)
    assert features.shape == (8, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with torch.no_grad():
        assert_close(model.head(torch.from_numpy(features)), model(data[0].image))


# ---- in a test run


def test_report_writes_tables_and_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    moe = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))
    module = VisionClassifier(
        vit=ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2),
        moe=moe,
        moe_blocks=[1],
        image_size=8,
        report=ReportConfig(
            few_shot=(5, 500), few_shot_seeds=2, capacity_factors=(0.5, 1.0), sweep_images=100, pictures=3
        ),
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, **options)
    (found,) = trainer.test(module, datamodule=VisionData("digits", eval_batch_size=100), verbose=False)
    assert 0.0 < found["test/few_shot_5"] <= 1.0
    assert "test/few_shot_500" not in found  # a class has only about 14 validation images
    folder = tmp_path / "report"
    assert {p.name for p in folder.iterdir()} == {
        "few_shot.csv",
        "capacity_sweep.csv",
        "capacity_sweep.png",
        "routing.png",
        "expert_class.png",
        "load.png",
    }
    rows = list(csv.DictReader((folder / "capacity_sweep.csv").open()))
    assert [(r["priority"], r["capacity_factor"]) for r in rows] == [
        (p, f) for p in ("position", "score") for f in ("0.5", "1.0", "")
    ]
    assert all(0.0 <= float(r["accuracy"]) <= 1.0 and math.isfinite(float(r["flops_per_image"])) for r in rows)
    printed = capsys.readouterr().out
    assert "Few-shot linear evaluation" in printed
    assert "dropless" in printed
    assert {r["images"] for r in rows} == {"100"}  # of 359
    assert "Capacity sweep at inference, 100 test images" in printed
    (batch,) = _limited(batches_of_test(trainer), 100)
    assert len(set(batch.label.tolist())) == 10


def test_a_class_without_test_images_is_in_no_picture(tmp_path, monkeypatch):
    moe = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))
    report = ReportConfig(few_shot=(), capacity_factors=(), pictures=1)
    vit = ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    module = VisionClassifier(vit=vit, moe=moe, moe_blocks=[0], image_size=8, report=report)
    data = VisionData("digits")
    data.setup("test")
    test = data._sets.test
    data._sets = data._sets._replace(test=test.subset((test.labels[test.index] != 3).nonzero().squeeze(1)))
    drawn = {}
    real = plots.expert_class_heatmap
    monkeypatch.setattr(
        plots, "expert_class_heatmap", lambda shares, names: (drawn.update(shares, names=names), real(shares, names))[1]
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    Trainer(default_root_dir=tmp_path, accelerator="cpu", **quiet).test(module, datamodule=data, verbose=False)
    assert drawn.pop("names") == ["0", "1", "2", "4", "5", "6", "7", "8", "9"]
    (share,) = drawn.values()
    assert share.sum(1) == pytest.approx(np.ones(9))


def test_the_command_says_where_the_report_is_and_what_it_leaves_out(tmp_path, capsys):
    model = {
        "class_path": "apps.vision.module.VisionClassifier",
        "init_args": {
            "vit": {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
            "report": {"few_shot": [2, 500], "few_shot_seeds": 1},
        },
    }
    (tmp_path / "c.yaml").write_text(
        json.dumps({"model": model, "data": "apps.vision.data.VisionData", "trainer": {"accelerator": "cpu"}})
    )
    argv = ["--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path), "--trainer.limit_test_batches", "1"]
    assert main(["test", *argv, "--ckpt_path", "none"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'report'}: few_shot.csv" in said
    assert "500-shot left out: a class has only 14 images to draw from" in said


def test_no_capacity_is_swept_where_the_router_has_none(tmp_path):
    module = VisionClassifier(
        vit=ViTConfig(patch_size=4, embed_dim=8, depth=2, num_heads=2),
        moe=core.MoEConfig(num_experts=2, router=core.SoftSlots(), expert=core.FFN(hidden_dim=8)),
        moe_blocks=[1],
        image_size=8,
        report=ReportConfig(few_shot=(), pictures=1),
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, **options)
    trainer.test(module, datamodule=VisionData("digits", eval_batch_size=100), verbose=False)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"routing.png", "expert_class.png", "load.png"}


def test_several_processes_leave_the_report_out(tmp_path, caplog):
    with caplog.at_level("INFO"):
        VisionReport(ReportConfig()).on_test_epoch_end(
            SimpleNamespace(world_size=2, default_root_dir=str(tmp_path), is_global_zero=True),
            SimpleNamespace(model=None),
        )
    assert not list(tmp_path.iterdir())
    assert "test with --trainer.devices 1" in caplog.text


def test_report_of_a_dense_model_is_the_few_shot_part_without_an_interval_of_one_draw(tmp_path, capsys):
    module = VisionClassifier(
        vit=ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2),
        image_size=8,
        report=ReportConfig(few_shot=(2,), few_shot_seeds=1),
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, **options)
    trainer.test(module, datamodule=VisionData("digits"), verbose=False)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["few_shot.csv"]
    assert "±" not in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "report" / "few_shot.csv").open())
    assert row["interval"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_shot": (0,)}, r"report.few_shot=\(0,\) must be numbers of at least 1"),
        ({"capacity_factors": (-1.0,)}, r"report.capacity_factors=\(-1.0,\) must be positive"),
        ({"few_shot_seeds": 0}, "report.few_shot_seeds=0 must be at least 1"),
        ({"pictures": -1}, "report.pictures=-1 must be at least 0"),
    ],
)
def test_refused_report_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReportConfig(**options)
