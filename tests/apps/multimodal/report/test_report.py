"""The report of a test of images with texts: which files it writes, what they hold, and what it leaves out."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from refusals import refused
from small_pairs import MOE, TOWER

import core
from apps.multimodal.data import ImageTextData
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.report.metrics import best_ranks
from apps.multimodal.report.report import PairReport, PairReportConfig, displayed
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.two_towers import TwoTowers
from apps.report.page import Picture, Table, Words, load_sections


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageTextData:
    cache = str(tmp_path_factory.mktemp("cache"))
    return ImageTextData("shapes", cache_dir=cache, subset=200, eval_batch_size=100, attributes=["colour", "size"])


def model(data: ImageTextData, **changed) -> ImageTextRetriever:
    torch.manual_seed(0)
    sizes = {name: getattr(data, name) for name in ImageTextRetriever.data_arguments}
    return ImageTextRetriever(**{**sizes, "tower": TOWER, "dim": 8, "moe": MOE, **changed})


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_report_writes_tables_and_pictures(tmp_path, data):
    report = PairReportConfig(samples=2, queries=2, probe_images=100, attribute_templates={"size": ("a {} shape",)})
    module = model(data, report=report, attribute_head=AttributeHead(core.MMoE(2, core.MLP((4,)))))
    (metrics,) = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    folder = tmp_path / "report"
    assert {p.name for p in folder.iterdir()} == {
        *("retrieval.csv", "retrieval.png", "attributes.csv", "expert_pieces.csv", "sections.json"),
        *("expert_modality.png", "expert_class.png", "expert_piece.png", "patches.png", "routing.png"),
    }
    sections = {section.title: section for section in load_sections(folder)}
    assert list(sections) == ["What is retrieved", "Classes", "What the experts are used for", "Words in sentences"]
    to_image, to_text = rows_of(folder / "retrieval.csv")
    assert (to_image["queries"], to_image["candidates"]) == ("250", "250")
    for row, way in ((to_image, "text_to_image"), (to_text, "image_to_text")):
        for name in ("recall_1", "recall_5", "recall_10", "median_rank"):
            assert float(row[name]) == pytest.approx(metrics[f"test/{way}_{name}"])
    colour, size = rows_of(folder / "attributes.csv")
    assert (colour["attribute"], colour["classes"], colour["images"]) == ("colour", "8", "250")
    for row in (colour, size):
        name = row["attribute"]
        assert float(row["zero_shot"]) == pytest.approx(metrics[f"test/zero_shot_{name}"])
        assert float(row["probe"]) == pytest.approx(metrics[f"test/linear_probe_{name}"])
        assert float(row["head_macro_f1"]) == pytest.approx(metrics[f"test/macro_f1_{name}"])
    assert float(size["probe"]) > 0.6  # a large shape has more pixels, which random weights tell as well
    pieces = rows_of(folder / "expert_pieces.csv")
    assert [(row["layer"], row["expert"]) for row in pieces] == [("block 1", str(e)) for e in range(4)]
    assert sum(float(row["share"]) for row in pieces) == pytest.approx(1)
    words = [part for part in sections["Words in sentences"].parts if isinstance(part, Words)]
    assert (len(words), words[0].labels.keys()) == (2, {"block 1"})
    pictures = [part for part in sections["What is retrieved"].parts if isinstance(part, Picture)]
    assert "the right image has rank" in pictures[0].alt
    assert isinstance(sections["Classes"].parts[0], Table)


def test_a_dense_model_and_options_that_leave_parts_out(tmp_path, data):
    report = PairReportConfig(pictures=False, zero_shot=()).brief()
    assert report.probe_images == 0
    module = model(data, moe=None, report=report)
    (metrics,) = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert not [name for name in metrics if "zero_shot" in name or "probe" in name]
    # What is left of the classes is how many images are of the commonest.
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"retrieval.csv", "attributes.csv", "sections.json"}


def test_experts_of_an_image_tower_have_no_typical_pieces(tmp_path, data):
    tower = TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER))
    module = model(data, tower=tower, report=PairReportConfig(pictures=False, zero_shot=(), probe_images=0))
    quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    pieces = rows_of(tmp_path / "report" / "expert_pieces.csv")
    assert [(row["layer"], row["expert"]) for row in pieces] == [("text block 1", str(e)) for e in range(4)]


def test_the_images_of_a_sentence(tmp_path, data):
    module, trainer = model(data, report=None), quiet_trainer(tmp_path)
    trainer.test(module, datamodule=data, verbose=False)
    report = PairReport(PairReportConfig(queries=3, samples=0, zero_shot=(), probe_images=0))
    test = report._read(trainer, module.eval(), data, {})
    from apps.multimodal.report.report import retrieved

    (one,) = retrieved(test, [4])
    assert one.sentence == data.texts[int(test.caption_J[4])]
    scores = test.gallery.image_ID @ test.gallery.text_JD[4]
    own = int(test.gallery.image_P[test.gallery.text_P == 4])
    assert (one.rank, one.is_right.count(True)) == (int((scores >= scores[own]).sum()), one.rank <= 6)
    best = int(test.image_I[scores.argmax()])
    np.testing.assert_allclose(one.images[0], data.pixels(torch.tensor([best]))[0].permute(1, 2, 0) / 255)
    ranks = best_ranks(test.gallery.text_JD, test.gallery.image_ID, test.gallery.text_P, test.gallery.image_P)
    assert one.rank == int(ranks[4])


def test_images_are_shown_in_their_own_colours(data):
    batch = next(iter(data.test_dataloader()))
    pixels = data.pixels(batch.image_B).permute(0, 2, 3, 1).numpy() / 255
    np.testing.assert_allclose(displayed(batch.image, data.encoding), pixels, atol=1e-5)


def test_what_is_refused(tmp_path, data):
    module = model(data, report=PairReportConfig(zero_shot=("weight",)))
    rule = r"report.zero_shot names 'weight', which is no attribute of the data \(colour"
    refused(rule, quiet_trainer(tmp_path).test, module, datamodule=data, verbose=False)
    rule = r"report.attribute_templates.size: the template 'a shape' must have"
    refused(rule, PairReportConfig, attribute_templates={"size": ("a shape",)})
