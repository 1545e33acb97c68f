"""The report of a test of images with texts, and what experts compute, against a loop over the routed pairs."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from refusals import refused
from small_pairs import MOE, TOWER, pair_batch, retriever

import core
from apps.multimodal.data import ImageTextData
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.report.metrics import best_ranks
from apps.multimodal.report.report import PairReport, PairReportConfig, displayed
from apps.multimodal.report.use import PairUse
from apps.multimodal.towers.pretrained import BertTexts, ViTImages
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.two_towers import TwoTowers
from apps.porting.sentences import BertConfig
from apps.report.page import Picture, Table, Words, load_sections
from apps.vision.model import ViTConfig


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


def test_parts_that_do_not_apply_are_left_out_and_wrong_options_refused(tmp_path, data):
    report = PairReportConfig(pictures=False, zero_shot=()).brief()
    assert report.probe_images == 0
    module = model(data, moe=None, report=report)
    (metrics,) = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert not [name for name in metrics if "zero_shot" in name or "probe" in name]
    # What is left of the classes is how many images are of the commonest.
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"retrieval.csv", "attributes.csv", "sections.json"}
    module = model(data, report=PairReportConfig(zero_shot=("weight",)))
    rule = r"report.zero_shot names 'weight', which is no attribute of the data \(colour"
    refused(rule, quiet_trainer(tmp_path).test, module, datamodule=data, verbose=False)
    rule = r"report.attribute_templates.size: the template 'a shape' must have"
    refused(rule, PairReportConfig, attribute_templates={"size": ("a shape",)})


def test_experts_of_an_image_tower_have_no_typical_pieces(tmp_path, data):
    tower = TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER))
    module = model(data, tower=tower, report=PairReportConfig(pictures=False, zero_shot=(), probe_images=0))
    quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    pieces = rows_of(tmp_path / "report" / "expert_pieces.csv")
    assert [(row["layer"], row["expert"]) for row in pieces] == [("text block 1", str(e)) for e in range(4)]


def test_an_image_of_a_sentence_is_found_and_shown_in_its_own_colours(tmp_path, data):
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
    batch = next(iter(data.test_dataloader()))
    pixels = data.pixels(batch.image_B).permute(0, 2, 3, 1).numpy() / 255
    np.testing.assert_allclose(displayed(batch.image, data.encoding), pixels, atol=1e-5)


def used(module, batches, wanted=0):
    use, tapes = PairUse(module.eval(), {"color": 3, "size": 2}, wanted), []
    for batch in batches:
        with torch.no_grad(), core.record(module) as tape:
            module(batch.image, batch.text_BL)
        use.add(tape, batch)
        tapes.append(tape)
    return use, tapes


def test_counts_are_those_of_a_loop():
    module, batches = retriever(), [pair_batch(4), pair_batch(5, seed=2)]
    use, tapes = used(module, batches)
    assert list(use.counts["modality"]) == ["block 1"]
    by_modality, by_class, by_piece = Counter(), Counter(), Counter()
    for batch, tape in zip(batches, tapes, strict=True):
        (entry,) = tape.entries
        routing, B = entry.routing, len(batch.image)
        length = routing.num_tokens // (2 * B)  # 4 patches, or as many pieces as the longest text has
        for t, e in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), strict=True):
            row, place = divmod(t, length)
            if e == 4:
                continue
            by_modality[int(row >= B), e] += 1
            if row < B:
                for a in range(2):
                    by_class[a, int(batch.label_BA[row, a]), e] += 1
            else:
                by_piece[int(batch.text_BL[row - B, place]), e] += 1
    counts = {what: of_layers["block 1"] for what, of_layers in use.counts.items()}
    # 2 experts for each of 4 patches of 9 images, and for the pieces of texts of 2, 3, 4, 5 and of 2, 3, 4, 5, 6.
    assert counts["modality"].sum(1).tolist() == [2 * 36, 2 * 34]
    for (m, e), count in by_modality.items():
        assert counts["modality"][m, e] == count
    for a, (attribute, classes) in enumerate({"color": 3, "size": 2}.items()):
        want = [[by_class[a, c, e] for e in range(4)] for c in range(classes)]  # -1 is no class
        assert counts[attribute].tolist() == want
    found = counts["piece"].nonzero()
    assert by_piece == {(int(v), int(e)): int(counts["piece"][v, e]) for v, e in zip(*found, strict=True)}
    commonest, count_V = use.frequent_pieces(["block 1"], 3), counts["piece"].sum(1)
    assert count_V[commonest[0]] == count_V.max()
    assert len(use.frequent_pieces(["block 1"], 1000)) == int((count_V > 0).sum())


def test_modalities_in_passes_of_their_own_count_as_in_one():
    module, batch = retriever().eval(), pair_batch(6)
    together, _ = used(module, [batch])
    apart = PairUse(module, {"color": 3, "size": 2})
    with torch.no_grad(), core.record(module) as tape:
        module.image_vectors(batch.image)
        module.text_vectors(batch.text_BL)
    assert len(tape.entries) == 2
    apart.add(tape, batch)
    for what, of_layers in together.counts.items():
        assert of_layers["block 1"].tolist() == apart.counts[what]["block 1"].tolist()
    assert torch.equal(together.patches["block 1"].gate_En, apart.patches["block 1"].gate_En)


def test_experts_are_shown_by_their_largest_gates():
    module, batch = retriever(), pair_batch(5)
    use, (tape,) = used(module, [batch])
    routing = tape.entries[0].routing
    length, sample = routing.num_tokens // 10, use.patches["block 1"]
    best: dict[tuple[int, int], tuple[float, int]] = {}
    pairs = (x.tolist() for x in (routing.token_index_N, routing.expert_ids_N, routing.gates_N))
    for t, e, gate in zip(*pairs, strict=True):
        image, patch = divmod(t, length)
        if image < 5 and gate > best.get((e, image), (0.0, 0))[0]:
            best[e, image] = (gate, patch)
    for expert in range(4):
        own = sorted((value for (e, _), value in best.items() if e == expert), reverse=True)
        gates = [gate for gate in sample.gate_En[expert].tolist() if gate > 0]
        assert gates == pytest.approx([gate for gate, _ in own])
    (gate, image, patch) = max((g, i, p) for (e, i), (g, p) in best.items() if e == 0)
    row, column = divmod(patch, 2)  # 2 x 2 patches of 4 x 4 pixels
    want = batch.image[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    assert torch.equal(sample.patch_EnCHW[0, 0], want)
    module, batch = retriever(), pair_batch(4)._replace(image_B=torch.tensor([3, 3, 5, 6]))
    use, (tape,) = used(module, [batch, pair_batch(4)][:1], wanted=2)
    assert [pair.caption for pair in use.shown] == [0, 2]  # pair 1 has the image of pair 0
    first, second = use.shown
    assert (first.ids, second.ids) == (batch.text_BL[0, :2].tolist(), batch.text_BL[2, :4].tolist())
    routing = tape.entries[0].routing
    length, gates = routing.num_tokens // 8, torch.zeros(routing.num_tokens, 5)
    gates[routing.token_index_N, routing.expert_ids_N] = routing.gates_N
    best_T = gates[:, :4].argmax(1)
    assert second.grids["block 1"].tolist() == best_T[2 * length : 2 * length + 4].view(2, 2).tolist()
    assert [experts[0] for experts in second.pieces["block 1"]] == best_T[6 * length : 6 * length + 4].tolist()


def only(expert: int):
    """Return a model whose pieces of texts all take one expert of two, and whose patches take both."""
    module = retriever(moe=core.MoEConfig(2, core.TokenChoice(top_k=1), core.FFN(hidden_dim=4)))
    (layer,) = core.moe_layers(module).values()

    def decide(router, args, kwargs, routing):
        modality_T = args[1].modality_BS.flatten()
        expert_N = torch.where(modality_T[routing.token_index_N] == 1, expert, routing.token_index_N % 2)
        expert_N = torch.where(routing.expert_ids_N == 2, 2, expert_N)
        counts_E = torch.bincount(expert_N, minlength=3)[:2]
        return replace(routing, expert_ids_N=expert_N, tokens_per_expert_E=counts_E, chosen_per_expert_E=counts_E)

    layer.router.register_forward_hook(decide, with_kwargs=True)
    return module


def test_experts_that_a_modality_never_reaches_raise_an_alarm_and_healthy_ones_none():
    use, _ = used(only(1), [pair_batch(40)])
    lines = use.alarms()
    # 40 texts of 2 to 6 pieces, 4 on average.
    assert "block 1: 1 of 2 experts (0) computed none of the 160 subwords of texts." in lines
    (of_doctor,) = (line for line in lines if "Remedy" in line)
    assert of_doctor.startswith("block 1: the tokens of text use 1.0 of 2 experts, and each takes 1.0. Remedy: give")
    use, _ = used(retriever(), [pair_batch(200)])
    assert use.alarms() == []
    ((name, shares),) = use.class_information().items()
    assert name == "block 1"
    assert all(0 <= share < 0.2 for share in shares)
    dense, _ = used(retriever(moe=None), [pair_batch(4)], wanted=2)
    assert (dict(dense.counts["modality"]), list(dense.shown), dense.alarms()) == ({}, [], [])


@pytest.mark.parametrize("tower", [
    TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER)),
    TwoTowers(
        ViTImages(vit=ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2)),
        BertTexts(bert=BertConfig(16, 32, depth=2, num_heads=2, max_positions=16)),
    ),
], ids=["from_scratch", "as_published"])  # fmt: skip
def test_a_tower_for_each_modality(tower):
    use, _ = used(retriever(tower=tower), [pair_batch(6)], wanted=2)
    by_modality = use.counts["modality"]
    assert set(by_modality) == {"image block 1", "text block 1"}
    assert by_modality["text block 1"].sum(1).tolist() == [0, 2 * (2 + 3 + 4 + 5 + 6 + 2)]
    of_images, of_texts = by_modality["image block 1"].sum(1)
    assert of_images >= 2 * 6 * 4  # a class token may stand before the patches
    assert (of_texts, use.patches["image block 1"].patch_EnCHW.shape[2:]) == (0, (3, 4, 4))
    assert (list(use.patches), list(use.counts["piece"])) == (["image block 1"], ["text block 1"])
    assert use.counts["piece"]["text block 1"].sum() == by_modality["text block 1"].sum()
    for pair in use.shown:
        assert (pair.grids["image block 1"].shape, len(pair.pieces["text block 1"])) == ((2, 2), len(pair.ids))
    assert not [line for line in use.alarms() if "Remedy" in line]
