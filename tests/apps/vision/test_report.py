"""What is shown of a classifier: the report of its test, few-shot accuracies, and its page."""

import csv
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from converted import write_run
from PIL import Image
from quiet_trainer import quiet_trainer
from refusals import refused
from shown_runs import answered, best_experts, digits_run, shown
from small_vit import batches, sparse
from torch.testing import assert_close

import apps
import core
from apps.cli import main
from apps.nets.depths import MixtureOfDepths
from apps.report.images import NO_EXPERT
from apps.report.page import HeatmapChart, load_sections
from apps.report.use import ExpertUse, Labels, load_parts
from apps.vision.data import VisionData
from apps.vision.encoding import normalize
from apps.vision.few_shot import draw_shots, extract_features, few_shot, linear_accuracy
from apps.vision.image_files import read_image
from apps.vision.model import ViTConfig, VMoE
from apps.vision.module import VisionClassifier
from apps.vision.report import Shown, VisionReport, VisionReportConfig, displayed, patch_rows

VIT = ViTConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2)
TINY = ViTConfig(patch_size=4, embed_dim=8, depth=1, num_heads=2)
PICTURES = {"routing.png", "expert_class.png", "load.png"}


def report_on(folder, data=None, moe=4, vit=VIT, **options):
    """Test on digits, which writes ``report``, and return the metrics; ``moe`` is a layer or a number of experts."""
    torch.manual_seed(0)
    moe = core.MoEConfig(moe, expert=core.FFN(hidden_dim=16)) if isinstance(moe, int) else moe
    if moe is not None:
        options = {"moe_blocks": [vit.depth - 1], **options}
    module = VisionClassifier(vit, moe, image_size=8, **options)
    data = data or VisionData("digits", eval_batch_size=100)
    (metrics,) = quiet_trainer(folder).test(module, datamodule=data, verbose=False)
    return metrics


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def test_report_writes_tables_and_pictures(tmp_path, capsys):
    metrics = report_on(tmp_path, report=VisionReportConfig(few_shot=(5, 500), few_shot_seeds=2, images=3))
    assert 0.0 < metrics["test/few_shot_5"] <= 1.0
    assert "test/few_shot_500" not in metrics  # a class has only about 14 validation images
    sections = load_sections(tmp_path / "report")
    assert files_in(tmp_path / "report") == {"few_shot.csv", *PICTURES, "sections.json"}
    assert [s.title for s in sections] == ["Answers", "What the experts are used for", "Few labeled images"]
    assert "Few-shot linear evaluation" in repr(sections)
    assert capsys.readouterr().out == ""


# The picture of patches is left out where few of them enter each layer of experts.
@pytest.mark.parametrize("moe, options, pictures", [
    (core.MoEConfig(2, core.SoftSlots(), core.FFN(8)), {}, PICTURES),
    (core.MoEConfig(4, core.ExpertChoice(2.0), core.Convolution(6)), {"vit": replace(VIT, pool="avg")}, PICTURES),
    (4, {"depths": MixtureOfDepths(0.5), "depth_blocks": [1]}, PICTURES - {"routing.png"}),
], ids=["soft slots", "convolutions", "depths"])  # fmt: skip
def test_pictures_of_other_layers(tmp_path, moe, options, pictures):
    report_on(tmp_path, moe=moe, report=VisionReportConfig(few_shot=(), images=1), **options)
    assert files_in(tmp_path / "report") == {*pictures, "sections.json"}


def without_class_3(data, split):
    own = getattr(data._opened, split)
    rest = own.subset((own.labels[own.index] != 3).nonzero().squeeze(1))
    data._opened = data._opened._replace(**{split: rest})


def test_a_class_that_a_split_lacks_is_in_no_chart_or_leaves_few_shot_out(tmp_path, caplog):
    data = VisionData("digits")
    data.setup("test")
    without_class_3(data, "test")
    report_on(tmp_path, data, vit=TINY, report=VisionReportConfig(few_shot=(), images=1))
    parts = [part for section in load_sections(tmp_path / "report") for part in section.parts]
    (chart,) = (part for part in parts if isinstance(part, HeatmapChart) and part.row_title == "class")
    assert [row.split()[0] for row in chart.rows] == ["0", "1", "2", "4", "5", "6", "7", "8", "9", "all"]
    assert np.sum(chart.values, axis=1) == pytest.approx(np.full(10, 100))
    data = VisionData("digits")
    data.setup("validate")
    without_class_3(data, "val")
    with caplog.at_level(logging.INFO):
        metrics = report_on(tmp_path, data, None, TINY, report=VisionReportConfig(few_shot=(1,)))
    assert "test/few_shot_1" not in metrics
    assert "1-shot left out: a class has only 0 images to draw from" in caplog.messages


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
    assert (use.counts["class"]["block 1"].tolist(), list(use.counts["class"])) == (by_hand, ["block 0", "block 1"])
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


def test_a_shown_image_has_its_own_colors():
    # An image of one shade has no range to be stretched over.
    data = VisionData("digits")
    data.setup("test")
    images = data.encoding.normalized(torch.full((1, 1, 8, 8), 51, dtype=torch.uint8), "cpu").numpy()[:, 0, ..., None]
    np.testing.assert_allclose(displayed(images, SimpleNamespace(datamodule=data)), 0.2, atol=1e-6)


def test_the_command_says_where_the_report_is_and_what_it_leaves_out(tmp_path, capsys):
    options = {"vit": vars(TINY), "report": {"few_shot": [2, 500], "few_shot_seeds": 1}}
    model = {"class_path": "VisionClassifier", "init_args": options}
    config = {"model": model, "data": "VisionData", "trainer": {"accelerator": "cpu"}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    argv = ["--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path), "--trainer.limit_test_batches", "1"]
    assert main(["test", *argv, "--ckpt_path", "none"]) == 0
    log_lines = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'report'}: few_shot.csv" in log_lines
    assert "500-shot left out: a class has only 14 images to draw from" in log_lines


def test_a_checkpoint_and_a_configuration_with_the_options_of_an_earlier_version_are_tested(tmp_path, caplog):
    module = VisionClassifier(vit=TINY, image_size=8, report=VisionReportConfig(few_shot=()))
    module.adopt_encoding({"encoding": VisionData("digits").encoding.state()})
    write_run(tmp_path, module, {"class_path": "VisionData"})
    path = tmp_path / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["report"] |= {"capacity_factors": [0.5], "sweep_images": 100}
    torch.save(checkpoint, path)
    model = {"class_path": "VisionClassifier", "init_args": checkpoint["hyper_parameters"]}
    config = {"model": model, "data": "VisionData", "trainer": {"accelerator": "cpu"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        assert apps.load(path).report == VisionReportConfig(few_shot=())
        assert main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1"]) == 0
    ignored = "options of VisionClassifier in earlier versions are ignored"
    assert f"{ignored}: report.capacity_factors, report.sweep_images" in caplog.text


def test_several_processes_or_a_dense_model_leave_parts_of_the_report_out(tmp_path, caplog):
    trainer = SimpleNamespace(world_size=2, default_root_dir=str(tmp_path), is_global_zero=True)
    with caplog.at_level("INFO"):
        VisionReport(VisionReportConfig()).on_test_epoch_end(trainer, SimpleNamespace(model=None))
    assert not list(tmp_path.iterdir())
    assert "test with --trainer.devices 1" in caplog.text
    report_on(tmp_path, moe=None, vit=TINY, report=VisionReportConfig(few_shot=(2,), few_shot_seeds=1))
    assert files_in(tmp_path / "report") == {"few_shot.csv", "sections.json"}
    assert "±" not in repr(load_sections(tmp_path / "report"))
    (row,) = csv.DictReader((tmp_path / "report" / "few_shot.csv").open())
    assert row["interval"] == ""


def clusters(per_class, spread, seed=0):
    """Three classes around the corners of a triangle in 4 dimensions, of which 2 are noise."""
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(3), per_class)
    centers = np.array([[3, 0, 0, 0], [-3, 0, 0, 0], [0, 3, 0, 0]], dtype=float)
    return centers[labels] + spread * rng.standard_normal((len(labels), 4)), labels


def test_shots_are_drawn_by_class_and_seed_and_a_plane_divides_clusters():
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 2, 2])
    drawn = draw_shots(labels, 2, seed=0)
    assert (labels[drawn].tolist(), len(set(drawn.tolist()))) == ([0, 0, 1, 1, 2, 2], 6)
    assert draw_shots(labels, 2, seed=0).tolist() == drawn.tolist()
    assert any(draw_shots(labels, 2, seed=s).tolist() != drawn.tolist() for s in (1, 2, 3))
    refused("3-shot evaluation needs 3 images a class: class 2 has 2", draw_shots, labels, 3, seed=0)
    support, test = clusters(10, 0.3), clusters(100, 0.3, seed=1)
    assert linear_accuracy(*support, *test) == 1.0
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((30, 4)), np.repeat(np.arange(3), 10)
    assert linear_accuracy(*noise, rng.standard_normal((3000, 4)), np.repeat(np.arange(3), 1000)) < 0.5


def test_more_shots_help_and_features_are_what_the_head_reads():
    features, labels = clusters(100, 2.0)
    features, test = features * [1e4, 1e-4, 1.0, 1.0], clusters(300, 2.0, seed=1)
    accuracies = few_shot(features, labels, test[0] * [1e4, 1e-4, 1.0, 1.0], test[1], shots=(2, 50), num_seeds=6)
    assert accuracies[50].mean > accuracies[2].mean
    assert accuracies[50].half_width < accuracies[2].half_width
    assert accuracies[2].count == 6
    model, data = sparse(), batches(1)
    features, labels = extract_features(model, data)
    assert (features.shape, labels.tolist()) == ((8, 8), [0, 1, 2, 0, 1, 2, 0, 1])
    with torch.no_grad():
        assert_close(model.head(torch.from_numpy(features)), model(data[0].image))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(digits_run(tmp_path_factory.mktemp("digits")))


def test_the_answer_and_the_experts_are_the_models(made, tmp_path):
    model, exhibit = made
    file = str(tmp_path / "own.png")
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(file)
    answer = answered(exhibit, file)
    (predicted,) = model.predict([file])
    assert dict(answer.parts[0].rows) == predicted.top
    pixels = model.encoding.transform(read_image(file))
    with core.record(model.model) as tape:
        model(normalize(pixels[None], model.encoding.mean, model.encoding.std))
    ((patches,),) = answer.layers.values()
    assert list(answer.layers) == ["block 1"]
    assert patches.experts.reshape(4, 2).tolist() == best_experts(tape.entries[0].routing)
    assert np.array_equal(patches.image, pixels[0].numpy())
    assert len({example.label for example in exhibit.examples}) == 3
    assert all(example.values[0].shape == (8, 8) for example in exhibit.examples)
    (tmp_path / "text.png").write_text("no image")
    refused(r"text\.png is corrupt", answered, exhibit, str(tmp_path / "text.png"))
