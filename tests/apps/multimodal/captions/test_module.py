"""The captioner: its loss by hand, what it trains, its captions of plain colours after a short training, bad input."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captioned import COLOURS, DECODER, MOE, SIDE, TEXTS, VIT, captioner, encoding, pairs
from PIL import Image
from refusals import refused
from torch.testing import assert_close

import core
from apps.base.files import CONFIGS
from apps.cli import main
from apps.multimodal.captions.module import ImageCaptioner
from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding
from apps.nets.config import TransformerConfig
from apps.nlp.text.scores import corpus_score

ALL = pairs(*zip(COLOURS, TEXTS, strict=True))


@pytest.fixture(scope="module")
def trained():
    """Return a captioner that has learned the four colours by heart."""
    module = captioner()
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        module.training_loss(ALL).total.backward()
        optimizer.step()
    return module.eval()


def plain(name):
    return np.broadcast_to(np.array([int(255 * c) for c in COLOURS[name]], dtype=np.uint8), (20, 30, 3)).copy()


def test_the_loss_is_the_cross_entropy_of_each_token_after_those_before_it():
    module, batch = captioner().eval(), pairs(("red", "a red picture"), ("blue", "a picture"))
    out, logits_BLV = module.task_loss(batch), module(batch.image, batch.text_BL[:, :-1])
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.text_BL[:, 1:], reduction="none", ignore_index=0)
    tokens_B = (batch.text_BL[:, 1:] != 0).sum(1)
    assert out.weight == int(tokens_B.sum())
    assert_close((out.loss, out.outputs.nll_B.float()), (nll_BL.sum() / tokens_B.sum(), nll_BL.sum(1)))
    values = module.comparison.example_values([out])
    assert (values.name, values.higher_is_better) == ("nats_per_token", False)
    assert values.mean == pytest.approx(float(out.loss))


def test_labels_are_smoothed_in_training_alone_and_the_cost_is_of_texts_of_mean_length():
    plain_module, smoothed = captioner(label_smoothing=0.0), captioner(label_smoothing=0.3)
    losses = [m.train().task_loss(ALL).loss for m in (plain_module, smoothed)]
    logits_TV = plain_module(ALL.image, ALL.text_BL[:, :-1])[ALL.text_BL[:, 1:] != 0]
    target_T = ALL.text_BL[:, 1:][ALL.text_BL[:, 1:] != 0]
    assert_close(losses[0], F.cross_entropy(logits_TV, target_T))
    assert_close(losses[1], F.cross_entropy(logits_TV, target_T, label_smoothing=0.3))
    assert_close(smoothed.eval().task_loss(ALL).loss, F.cross_entropy(logits_TV, target_T))
    batch = pairs(("red", "a red picture"), ("blue", "a blue picture of a blue picture"))
    image, read_BL = captioner().cost_inputs(batch)
    lengths = (batch.text_BL != 0).sum(1) - 1  # the end is not read
    assert (image.shape, read_BL.shape) == ((2, 3, SIDE, SIDE), (2, round(float(lengths.double().mean()))))
    assert (read_BL != 0).all()


def test_a_trained_captioner_names_the_colours_alike_whatever_an_image_is_given_as(trained, tmp_path):
    assert trained.predict([plain(name) for name in COLOURS]) == list(TEXTS)
    path = tmp_path / "blue.png"
    Image.fromarray(plain("blue")).save(path)
    transparent = Image.fromarray(plain("blue")).convert("RGBA")
    assert trained.predict([path, str(path), transparent, plain("blue")]) == ["a blue picture"] * 4
    untrained = captioner().eval()
    with torch.no_grad():
        untrained.model.embed.weight[3] = 0.0  # its end is unlikely
    assert max(map(len, untrained.hypotheses_of(ALL.image, untrained.decode).best)) <= untrained.max_tokens


def test_candidates_are_best_first_and_two_tests_are_compared_by_their_captions(trained):
    (found,) = trained.candidates([plain("red")], num_return_sequences=3, num_beams=4)
    assert found[0].text == "a red picture"
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    (one,) = trained.candidates([plain("red")], method="greedy")
    assert one[0].text == "a red picture"
    sampled = {"method": "sample", "num_return_sequences": 4, "temperature": 9.0}
    drawn = [trained.candidates([plain("red")], **sampled, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    texts = [["a red hat", "a hat in red"], ["two blue shoes"], ["a green bag"]]

    def examples(*captions):
        rows = enumerate(zip(captions, texts, strict=True))
        return [{"index": i, "image": f"{i}.png", "caption": c, "references": own} for i, (c, own) in rows]

    good, bad = examples("a hat in red", "two blue shoes", "a green bag"), examples("hat", "one shoe", "bag of green")
    bleu, chrf = trained.comparison.compare_examples(good, bad)
    assert (bleu.name, chrf.name, bleu.over) == ("BLEU", "chrF++", "test images")
    assert chrf.difference == pytest.approx(100 - corpus_score("chrf", [e["caption"] for e in bad], texts))
    refused("not of the same images", trained.comparison.compare_examples, good, bad[:2])
    lines = trained.comparison.side_by_side({"sparse": good, "dense": bad}).splitlines()
    assert lines[:4] == ["0.png", "  text    a red hat", "  sparse  a hat in red", "  dense   hat"]
    assert len(lines) == 3 * 4 + 2  # an empty line between images


def test_an_image_of_several_texts_is_captioned_once_and_references_are_the_datas_own_texts(trained, monkeypatch):
    batch = pairs(("red", "a red picture"), ("red", "a picture of red"), ("blue", "blue"), numbers=[4, 9, 6])
    first, second, third = trained.judged(batch, trained.task_loss(batch), "test").outputs
    assert (first.written, second.written, third.written) == ("a red picture", None, "a blue picture")
    assert [first.group, second.group, third.group] == [0, 0, 2]
    assert [p.index for p in (first, second, third)] == [4, 9, 6]
    # The data give no texts here: the subwords are decoded.
    assert [p.reference for p in (first, second, third)] == ["a red picture", "a picture of red", "blue"]
    metrics = trained.build_metrics()
    metrics.update([first, second, third])
    # "a red picture" has 3 of its 3 words right and "a blue picture" 1 of 3, of pairs 2 of 2 and 0 of 2, and so on.
    metrics.compute()
    assert [image.references for image in metrics.images] == [("a red picture", "a picture of red"), ("blue",)]
    data = SimpleNamespace(texts=["A Red Picture", "Blue"], encoding_state=encoding().state())
    monkeypatch.setattr(trained, "_data", lambda: data)
    batch = pairs(("red", "a red picture"), ("blue", "a blue picture"))
    # The model reads no capitals, so the references have none either.
    judged = trained.judged(batch, trained.task_loss(batch), "test").outputs
    assert [p.reference for p in judged] == ["a red picture", "blue"]


@pytest.mark.parametrize("trained, moving", [
    ("decoder", lambda name: not name.startswith("encoder.")),
    ("connector", lambda name: name.startswith("connector.")),
    ("experts", lambda name: ".ffn." in name and "layers.1." in name),
])  # fmt: skip
def test_what_is_not_trained_has_no_gradient(trained, moving):
    module = captioner(trained=trained)
    module.training_loss(ALL).total.backward()
    assert all((p.grad is not None) == moving(name) for name, p in module.model.named_parameters())


def test_the_encoder_begins_with_that_of_another_model_and_word_pieces_are_refused(tmp_path):
    source, path = captioner(), tmp_path / "encoder.ckpt"
    with torch.no_grad():
        source.model.encoder.pos_embed.add_(1.0)
    torch.save({"state_dict": source.state_dict()}, path)
    module = captioner(encoder_from=str(path))
    assert not torch.equal(module.model.encoder.pos_embed, source.model.encoder.pos_embed)
    module.setup("fit")
    for name, tensor in source.model.encoder.state_dict().items():
        assert torch.equal(module.model.encoder.state_dict()[name], tensor), name
    for name, tensor in captioner().model.decoder.state_dict().items():
        assert torch.equal(module.model.decoder.state_dict()[name], tensor), name
    pieces = TextEncoding(pieces=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"))
    state, module = replace(encoding(), text=pieces).state(), captioner()
    module.adopt_encoding({"encoding": state})
    assert PairEncoding.from_state(state).text.subwords is None
    refused("word pieces of a sentence encoder", module.setup, "fit")


def test_a_dense_twin_costs_the_same_and_an_encoder_may_have_routers_that_a_decoder_may_not():
    module = captioner()
    twin = module.comparison.baselines()["dense_equal_flops"].build()
    assert not core.moe_layers(twin)
    # 2 experts of hidden dim 8 and the gate: 2 * 2 * 16 * 8 + 16 * 4 = 576 multiplications a token; a dense FFN of
    # hidden dim 18 has 2 * 16 * 18 = 576.
    assert twin.model.decoder.layers[1].ffn.w_in.out_features == 18
    assert twin.model.decoder.layers[0].ffn.w_in.out_features == DECODER.shape.hidden_dim
    assert module.comparison.moe_block_names == ("model.decoder.layers.1.ffn",)
    assert isinstance(module.comparison.with_moe(replace(MOE, router=core.Dense())).moe.router, core.Dense)
    moe = replace(MOE, router=core.ExpertChoice())
    module = captioner(moe=moe, encoder_moe_blocks="last1", decoder_moe_blocks="none")
    assert list(core.moe_layers(module)) == ["model.encoder.blocks.1.mlp"]


@pytest.mark.parametrize("changed, message", [
    ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is not in \[0, 1\)"),
    ({"max_tokens": 2}, "max_tokens=2 must be at least 3"),
    ({"val_decode": "beam"}, "val_decode"),
    ({"trained": "encoder"}, "trained"),
    ({"trained": "experts", "moe": None}, "leaves nothing to train: the model has no MoE layers"),
    ({"bleu_tokenize": "14a"}, "bleu_tokenize='14a' is not one of"),
    ({"dense_ffn": core.DenseFFN(8)}, "is for a dense model"),
    ({"transformer": TransformerConfig("nano", positions="learned", max_length=8)}, "max_tokens=12 exceeds"),
    ({"moe": replace(MOE, router=core.ExpertChoice())}, "not for a causal decoder"),
    ({"moe": replace(MOE, router=core.Task(num_tasks=2, top_k=1))}, "needs context.task_ids_B"),
])  # fmt: skip
def test_bad_arguments(changed, message):
    refused(message, captioner, **changed)


def test_bad_images(trained, tmp_path):
    refused(r"must be a list: write predict\(\[image\]\)", trained.predict, "picture.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    refused(r"broken.png is corrupt", trained.predict, [tmp_path / "broken.png"])
    refused(r"images\[1\] is of type int", trained.predict, [plain("red"), 3])
    refused("num_return_sequences=2", trained.predict, [plain("red")], num_return_sequences=2)
    refused("beem_size", trained.predict, [plain("red")], beem_size=2)
    assert trained.predict([]) == []
    unread = ImageCaptioner(vit=VIT, transformer=DECODER, image_size=SIDE)  # without a checkpoint
    refused("does not know its subwords", unread.predict, [plain("red")])


def test_a_training_begins_before_the_case_of_its_texts_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu")
    config = str(CONFIGS / "multimodal" / "shapes_captions.yaml")
    assert main(["fit", "--config", config, *few, "--data.batch_size", "4"]) == 0
