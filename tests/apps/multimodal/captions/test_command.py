"""Captions from data to files and pages: a training with its test, predictions of folders and pairs, and the demo."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from made_captions import picture, write_csv, write_pictures
from quiet_trainer import quiet_trainer
from refusals import refused
from shown_runs import answered, best_experts, captioner_run, shown

import core
from apps.cli import main
from apps.data.subwords import BOS_ID, SubwordConfig
from apps.multimodal.captions.module import ImageCaptioner
from apps.multimodal.data import ImageTextData
from apps.nlp.decode import DecodeConfig
from apps.train.checkpoint.loading import load
from apps.vision.image_files import scaled


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return captioner_run(tmp_path_factory.mktemp("captioner"))


def predicted(run, folder, *options):
    assert (
        main(["predict", "--ckpt_path", str(run), "--output", str(folder / "out.jsonl"), "--overwrite", *options]) == 0
    )
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_folders_and_pairs_are_captioned_and_what_cannot_be_read_is_left_out(run, tmp_path, capsys):
    shop = tmp_path / "new"
    write_pictures(shop, 3)
    picture(1).convert("L").save(shop / "grey.gif")
    (shop / "1.png").write_bytes(b"no image")
    rows = predicted(run, tmp_path, "--data.images", str(shop))
    assert [(row["index"], row["image"]) for row in rows] == [(0, "0.png"), (2, "2.png"), (3, "grey.gif")]
    model = load(run)
    names = ("0.png", "2.png", "grey.gif")
    assert [row["caption"] for row in rows] == model.predict([shop / name for name in names])
    assert all(set(row) == {"index", "image", "caption", "score"} for row in rows)
    assert "1.png is corrupt" in capsys.readouterr().err
    rows = predicted(run, tmp_path, "--model.decode.num_return_sequences", "2")
    assert len(rows) == 6  # the test's
    for row in rows:
        number = row["image"].split("/")[-1].removesuffix(".png")
        assert row["reference"].startswith(f"picture {number} in ")
        assert len(row["alternatives"]) == 1
    for options, message in (
        ({"predict_file": "texts.txt"}, "reads images: give data.images"),
        ({"images": "shop", "query": "a red picture"}, "give data.images alone"),
    ):
        refused(message, quiet_trainer(run).predict, load(run), ImageTextData(**options))


def test_a_training_is_tested_with_all_texts_of_an_image(tmp_path):
    names = write_pictures(tmp_path / "shop", 12)
    rows = [{"image": name, "caption": f"{what} {n}"} for n, name in enumerate(names) for what in ("a", "one")]
    write_csv(tmp_path / "shop" / "titles.csv", rows)
    files = {"dataset": "image_captions", "root": str(tmp_path / "shop"), "cache_dir": str(tmp_path / "cache")}
    subwords = SubwordConfig(vocab_size=300)
    data = ImageTextData(**files, tokenizer=subwords, image_size=8, val_size=3, test_size=3, split_seed=1)
    sizes = {"image_size": 8, "vocab_size": data.vocab_size, "max_tokens": data.max_tokens}
    from captioned import DECODER, MOE, VIT

    decode = DecodeConfig("greedy", max_length_ratio=0.2, max_length_extra=0)
    module = ImageCaptioner(VIT, DECODER, MOE, decode=decode, **sizes)
    trainer: Trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert 0 <= float(trainer.callback_metrics["val/bleu"]) <= 100
    (values,) = trainer.test(module, data, verbose=False)
    assert {"test/bleu", "test/chrf", "test/token_accuracy", "test/perplexity", "test/loss"} <= set(values)
    # Three images with two texts each, in lower case as the model reads them.
    signatures = module.metric_signatures
    assert signatures["bleu"].startswith("nrefs:2|case:lc|")
    report = tmp_path / "report"
    assert (report / "signatures.txt").read_text() == f"bleu {signatures['bleu']}\nchrf {signatures['chrf']}\n"
    captions = [json.loads(line) for line in (report / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 3
    assert all(len(row["references"]) == 2 and row["image"].endswith(".png") for row in captions)
    assert {"signatures.txt", "expert_subwords.csv", "image_1_words.png"} <= {p.name for p in report.iterdir()}


@pytest.fixture(scope="module")
def made(run):
    return shown(run)


@pytest.fixture
def file(tmp_path) -> str:
    picture(2).save(tmp_path / "own.png")
    return str(tmp_path / "own.png")


def test_the_caption_is_the_models_and_the_experts_are_of_its_pass(made, file, tmp_path):
    model, exhibit = made
    answer = answered(exhibit, file)
    best, *further = model.candidates([file], num_return_sequences=3)[0]
    said, table = answer.parts
    assert said.text == (best.text or "(an empty text)")
    assert table.rows == tuple((c.text, f"{c.score:.3f}") for c in further)
    assert list(answer.layers) == ["block 1", "decoder 1"]
    image = model.encoding.normalized(scaled([file], model.encoding.transform), "cpu")
    written = model.hypotheses_of(image, model.decode).best[0]
    with core.record(model.model) as tape:
        model(image, torch.tensor([[BOS_ID, *written]]))
    of_image, of_text = (best_experts(entry.routing) for entry in tape.entries)
    ((patches,), (pieces,)) = answer.layers.values()
    assert patches.experts.reshape(-1, 2).tolist() == of_image[1:]  # after the class token
    assert np.array_equal(patches.image, np.asarray(picture(2)))
    assert pieces.experts.tolist() == of_text
    (tmp_path / "text.png").write_text("no image")
    refused(r"text\.png is corrupt", answered, exhibit, str(tmp_path / "text.png"))
    assert len(exhibit.examples) == 3
    for example in exhibit.examples:
        assert np.array_equal(example.values[0], np.asarray(picture(int(example.label.split()[1]))))
