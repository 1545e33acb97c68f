"""The report of a classifier's test: which files it writes, what it prints, what it leaves out."""

from __future__ import annotations

import csv
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer

import apps
import core
from apps.cli import main
from apps.nets.depths import MixtureOfDepths
from apps.report.images import NO_EXPERT
from apps.report.page import HeatmapChart, load_sections
from apps.report.use import ExpertUse, Labels, load_parts
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig, VMoE
from apps.vision.module import VisionClassifier
from apps.vision.report import Shown, VisionReport, VisionReportConfig, displayed, patch_rows

VIT = ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2)


def test_report_writes_tables_and_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    moe = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))
    module = VisionClassifier(
        vit=ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2),
        moe=moe,
        moe_blocks=[1],
        image_size=8,
        report=VisionReportConfig(few_shot=(5, 500), few_shot_seeds=2, images=3),
    )
    data = VisionData("digits", eval_batch_size=100)
    (metrics,) = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert 0.0 < metrics["test/few_shot_5"] <= 1.0
    assert "test/few_shot_500" not in metrics  # a class has only about 14 validation images
    folder = tmp_path / "report"
    assert {p.name for p in folder.iterdir()} == {
        "few_shot.csv",
        "routing.png",
        "expert_class.png",
        "load.png",
        "sections.json",
    }
    assert [s.title for s in load_sections(folder)] == [
        "Answers",
        "What the experts are used for",
        "Few labeled images",
    ]
    assert "Few-shot linear evaluation" in repr(load_sections(folder))
    assert capsys.readouterr().out == ""


def test_a_class_without_test_images_is_in_no_chart(tmp_path):
    moe = core.MoEConfig(num_experts=4, expert=core.FFN(hidden_dim=16))
    report = VisionReportConfig(few_shot=(), images=1)
    vit = ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    module = VisionClassifier(vit=vit, moe=moe, moe_blocks=[0], image_size=8, report=report)
    data = VisionData("digits")
    data.setup("test")
    test = data._opened.test
    data._opened = data._opened._replace(test=test.subset((test.labels[test.index] != 3).nonzero().squeeze(1)))
    quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    parts = [part for section in load_sections(tmp_path / "report") for part in section.parts]
    (chart,) = (part for part in parts if isinstance(part, HeatmapChart) and part.row_title == "class")
    assert [row.split()[0] for row in chart.rows] == ["0", "1", "2", "4", "5", "6", "7", "8", "9", "all"]
    assert np.sum(chart.values, axis=1) == pytest.approx(np.full(10, 100))


def recorded(moe, count=6, **options):
    """Return a model, the tape of a pass over images of classes 0, 1, 2, 0, ..., and their batch."""
    torch.manual_seed(0)
    network = VMoE(VIT, image_size=8, in_chans=1, num_classes=3, ffn=moe, moe_blocks="all", **options).eval()
    batch = SimpleNamespace(image=torch.randn(count, 1, 8, 8), label=torch.arange(count) % 3)
    with torch.no_grad(), core.record(network) as tape:
        network(batch.image)
    return network, tape, batch


def test_the_gate_before_a_block_is_none_of_its_experts():
    moe = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(hidden_dim=8))
    network, tape, batch = recorded(moe, depths=MixtureOfDepths(0.5))
    assert [entry.name for entry in tape.entries] == ["blocks.0.mlp", "blocks.1.depth_gate", "blocks.1.mlp"]
    use = ExpertUse(lambda entry, batch: {"class": batch.label}, {"class": Labels("class", 3)})
    use.add(tape, batch)
    ids_BS = tape.entries[2].routing.expert_ids_N.view(6, 9)  # half of 16 patches and the class token enter
    by_hand = [[int((ids_BS[c::3] == e).sum()) for e in range(4)] for c in range(3)]
    assert use.counts["class"]["block 1"].tolist() == by_hand
    assert list(use.counts["class"]) == ["block 0", "block 1"]
    load = np.sum(by_hand, 0) / 54 * 100
    assert [chart.title for chart in load_parts(use.stats)] == ["Load, block 0", "Load, block 1"]
    assert load_parts(use.stats)[1].series["block 1"] == pytest.approx(tuple(load))
    shown = Shown()
    shown.add(network, tape, batch, 3)
    assert list(shown.experts) == ["block 0"]  # the patches that enter block 1 have no places


def test_a_dropped_patch_is_no_expert_of_a_layer_with_more_experts():
    # Room for ceil(0.25 * 102 / 4) = 7 tokens an expert.
    few = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(hidden_dim=8), eval_capacity_factor=0.25)
    network, tape, batch = recorded([few, core.MoEConfig(8, expert=core.FFN(hidden_dim=8))])
    shown = Shown()
    shown.add(network, tape, batch, 6)
    images = [(np.zeros((8, 8)), {name: own[i] for name, own in shown.experts.items()}) for i in range(6)]
    texts = [text for _, tile, _ in patch_rows(images, 8) for row in tile.texts for text in row]
    computed_17 = (tape.entries[0].routing.expert_ids_N < 4).view(6, 17)
    assert [text != NO_EXPERT for text in texts] == computed_17[:, 1:].flatten().tolist()
    assert 68 <= texts.count(NO_EXPERT) < 96
    assert set(texts) <= {"0", "1", "2", "3", NO_EXPERT}


def test_no_picture_of_patches_where_few_enter_each_layer_of_experts(tmp_path):
    options = {"moe_blocks": [1], "depths": MixtureOfDepths(0.5), "depth_blocks": [1], "image_size": 8}
    report = VisionReportConfig(few_shot=(), images=1)
    module = VisionClassifier(VIT, core.MoEConfig(4, expert=core.FFN(hidden_dim=8)), report=report, **options)
    quiet_trainer(tmp_path).test(module, datamodule=VisionData("digits", eval_batch_size=100), verbose=False)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"expert_class.png", "load.png", "sections.json"}


def test_a_class_that_only_the_test_has_leaves_few_shot_out(tmp_path, caplog):
    vit = ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    module = VisionClassifier(vit=vit, image_size=8, report=VisionReportConfig(few_shot=(1,)))
    data = VisionData("digits")
    data.setup("validate")
    val = data._opened.val
    data._opened = data._opened._replace(val=val.subset((val.labels[val.index] != 3).nonzero().squeeze(1)))
    with caplog.at_level(logging.INFO):
        (metrics,) = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert "test/few_shot_1" not in metrics
    assert "1-shot left out: a class has only 0 images to draw from" in caplog.messages


def test_a_shown_image_has_its_own_colors():
    # An image of one shade has no range to be stretched over.
    data = VisionData("digits")
    data.setup("test")
    images = data.encoding.normalized(torch.full((1, 1, 8, 8), 51, dtype=torch.uint8), "cpu").numpy()[:, 0, ..., None]
    np.testing.assert_allclose(displayed(images, SimpleNamespace(datamodule=data)), 0.2, atol=1e-6)


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
    log_lines = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'report'}: few_shot.csv" in log_lines
    assert "500-shot left out: a class has only 14 images to draw from" in log_lines


def test_soft_slots_have_a_report(tmp_path):
    moe = core.MoEConfig(num_experts=2, router=core.SoftSlots(), expert=core.FFN(hidden_dim=8))
    vit = ViTConfig(patch_size=4, embed_dim=8, depth=2, num_heads=2)
    report = VisionReportConfig(few_shot=(), images=1)
    module = VisionClassifier(vit=vit, moe=moe, moe_blocks=[1], image_size=8, report=report)
    quiet_trainer(tmp_path).test(module, datamodule=VisionData("digits", eval_batch_size=100), verbose=False)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        *("routing.png", "expert_class.png", "load.png", "sections.json")
    }


def test_a_checkpoint_and_a_configuration_with_the_options_of_an_earlier_version_are_tested(tmp_path, caplog):
    vit = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    module = VisionClassifier(vit=ViTConfig(**vit), image_size=8, report=VisionReportConfig(few_shot=()))
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=VisionData("digits"))
    path = tmp_path / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["report"] |= {"capacity_factors": [0.5], "sweep_images": 100}
    torch.save(checkpoint, path)
    model = {"class_path": "VisionClassifier", "init_args": checkpoint["hyper_parameters"]}
    (tmp_path / "config.yaml").write_text(
        json.dumps({"model": model, "data": "VisionData", "trainer": {"accelerator": "cpu"}})
    )
    with caplog.at_level("INFO"):
        assert apps.load(path).report == VisionReportConfig(few_shot=())
        assert main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1"]) == 0
    ignored = "options of VisionClassifier in earlier versions are ignored"
    assert f"{ignored}: report.capacity_factors, report.sweep_images" in caplog.text


def test_several_processes_leave_the_report_out(tmp_path, caplog):
    with caplog.at_level("INFO"):
        VisionReport(VisionReportConfig()).on_test_epoch_end(
            SimpleNamespace(world_size=2, default_root_dir=str(tmp_path), is_global_zero=True),
            SimpleNamespace(model=None),
        )
    assert not list(tmp_path.iterdir())
    assert "test with --trainer.devices 1" in caplog.text


def test_report_of_a_dense_model_is_the_few_shot_part_without_an_interval_of_one_draw(tmp_path, capsys):
    module = VisionClassifier(
        vit=ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2),
        image_size=8,
        report=VisionReportConfig(few_shot=(2,), few_shot_seeds=1),
    )
    quiet_trainer(tmp_path).test(module, datamodule=VisionData("digits"), verbose=False)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"few_shot.csv", "sections.json"}
    assert "±" not in repr(load_sections(tmp_path / "report"))
    (row,) = csv.DictReader((tmp_path / "report" / "few_shot.csv").open())
    assert row["interval"] == ""
