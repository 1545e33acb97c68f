"""Exported translators and language models: ``predict --onnx``, and the scripts of docs/reference/onnx_scripts.md."""

import json
from dataclasses import replace

import pytest
import torch
from converted import write_run
from copying import copy_data, translator
from doc_scripts import output, script
from torch_graphs import folder_of, output_in_torch

import core
from apps.cli import main
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nlp.decode import DecodeConfig
from apps.nlp.language.module import LanguageModeler
from apps.nlp.language.task import Continuation
from apps.nlp.translation.task import Translation
from apps.train.publish.exported import ExportedModel

TRANSLATE = script("docs/reference/onnx_scripts.md", "python translate.py")
CONTINUE = script("docs/reference/onnx_scripts.md", "python continue.py")
TRANSFORMER = TransformerConfig("nano", dim=16, hidden_dim=16, encoder_layers=1, decoder_layers=1, dropout=0.0)
MOE = core.MoEConfig(2, core.Task(num_tasks=2, top_k=1), core.FFN(hidden_dim=8))
TEXTS = ["red blue\t green black", "", "black red red blue green"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_data(tmp_path_factory.mktemp("copies"), ("de", "fr"))


def strong(module):
    """Return the module with weights so large that its texts are of many words."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5, generator=generator)
    return module.eval()


def sparse_translator(data, moe=MOE):
    search = DecodeConfig("beam", num_beams=2, max_length_ratio=1.0, max_length_extra=2, min_new_tokens=2)
    return strong(translator(data, moe, transformer=TRANSFORMER, decoder_moe_blocks=[0], decode=search))


def lines(capsys, *argv):
    capsys.readouterr()
    assert main([*argv]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("router", [core.Task(num_tasks=2, top_k=1), core.Domain(num_domains=2)])
def test_the_script_translates_as_the_model_does_greedily(router, data, tmp_path):
    module = sparse_translator(data, replace(MOE, router=router))
    exported = Translation(module).exported()
    prefix = [module.subwords.tag_id("fr")]
    assert exported.preprocessing["pairs"]["en-fr"] == {"prefix": prefix, "task_ids": 1, "domain_ids": 1}
    folder = str(folder_of(exported, tmp_path))
    for pair in data.pairs:
        texts = [output_in_torch(TRANSLATE, exported, folder, pair, text) for text in TEXTS]
        assert texts == module.predict(TEXTS, pair, method="greedy")
        assert len(set(texts)) == 3
    if isinstance(router, core.Task):
        long = " ".join(TEXTS[2:] * 99)  # is cut after 256 subwords
        texts = [output_in_torch(TRANSLATE, exported, folder, "en-de", long)]
        assert texts == module.predict([long], "en-de", method="greedy")
    model = LanguageModeler(data.subwords, TRANSFORMER, replace(MOE, router=core.Domain(num_domains=2)))
    with pytest.raises(ValueError, match="whose routers ask for a domain is not exported"):
        Continuation(model).exported()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_script_goes_on_as_the_model_does_greedily(positions, data, tmp_path):
    config = TransformerConfig("nano", dim=16, hidden_dim=16, positions=positions, max_length=20)
    search = DecodeConfig("greedy", max_length_ratio=0.5, max_length_extra=12, min_new_tokens=3)
    module = LanguageModeler(data.subwords, config, depths=MixtureOfDepths(0.5, predictor=True), decode=search)
    exported = Continuation(strong(module)).exported()
    assert exported.preprocessing["max_positions"] == (20 if positions == "learned" else None)
    folder = str(folder_of(exported, tmp_path))
    assert [output_in_torch(CONTINUE, exported, folder, text) for text in TEXTS] == module.predict(TEXTS)


def test_continuations_of_predict_and_of_the_script_are_those_of_the_checkpoint(data, tmp_path, capsys):
    search = DecodeConfig("greedy", max_length_ratio=0.0, max_length_extra=9)
    module = LanguageModeler(data.subwords, TRANSFORMER, decode=search)
    options = {"dataset": "text", "root": data.root, "train_files": "train.en"}
    run, exported = tmp_path / "run", tmp_path / "exported"
    write_run(run, strong(module), {"class_path": "TextData", "init_args": options})
    assert main(["export", "--ckpt_path", str(run), "--output", str(exported)]) == 0
    assert sorted(path.name for path in exported.iterdir()) == ["export.json", "model.onnx", "subwords.model"]
    expected = module.predict(TEXTS)
    assert lines(capsys, "predict", "--onnx", str(exported), "--data.text", json.dumps(TEXTS)) == expected
    assert output(CONTINUE, str(exported), TEXTS[0]) == expected[0]
    model = ExportedModel.read(exported).load()
    assert not list(model.parameters())
    beam = {"method": "beam", "num_beams": 3, "num_return_sequences": 2}
    assert [c.text for c in model.candidates(TEXTS, **beam)[0]] == [c.text for c in module.candidates(TEXTS, **beam)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("router", [core.Task(num_tasks=2, top_k=1), core.Domain(num_domains=2)])
def test_translations_of_predict_and_of_the_script_are_those_of_the_checkpoint(router, data, tmp_path, capsys):
    module = sparse_translator(data, replace(MOE, router=router))
    run, exported = tmp_path / "run", tmp_path / "exported"
    options = {"dataset": "moses", "pairs": list(data.pairs), "root": data.root, "train_files": "train"}
    write_run(run, module, {"class_path": "TranslationData", "init_args": options})
    assert main(["export", "--ckpt_path", str(run), "--output", str(exported)]) == 0
    names = ["decoder.onnx", "encoder.onnx", "export.json", "subwords.model"]
    assert sorted(path.name for path in exported.iterdir()) == names
    asked = ["--data.text", json.dumps(TEXTS), "--data.predict_pair", "en-fr"]
    greedy = ["--model.decode.method", "greedy"]
    for own in ([], greedy, ["--model.decode.num_return_sequences", "2"]):
        expected = lines(capsys, "predict", "--ckpt_path", str(run), *asked, *own)
        assert lines(capsys, "predict", "--onnx", str(exported), *asked, *own) == expected
        assert len(set(expected)) > 2
    expected = lines(capsys, "predict", "--onnx", str(exported), *asked, *greedy)
    assert [output(TRANSLATE, str(exported), "en-fr", text) for text in TEXTS] == expected
