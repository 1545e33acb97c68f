"""Translators and language models that left the suite: ``predict --onnx`` and the scripts of docs/serving.md."""

from __future__ import annotations

import json

import pytest
import torch
from converted import write_run
from copying import copy_data, translator
from doc_scripts import output, script

import core
from apps.cli import main
from apps.nets.config import TransformerConfig
from apps.nlp.decode import DecodeConfig
from apps.nlp.language.module import LanguageModeler
from apps.train.exported import ExportedModel

GREEDY = ["--model.decode.method", "greedy"]
TRANSFORMER = TransformerConfig("nano", dim=16, hidden_dim=16, encoder_layers=1, decoder_layers=1, dropout=0.0)
TEXTS = ["red blue  green black", "", "black red red blue green"]


def strong(module):
    """Return the module with weights so large that its texts are of many words."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5, generator=generator)
    return module


def lines(capsys, *argv):
    capsys.readouterr()
    assert main([*argv]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("copies")


def test_translations_of_predict_and_of_the_script_are_those_of_the_checkpoint(folder, tmp_path, capsys):
    data = copy_data(folder, ("de", "fr"))
    search = DecodeConfig("beam", beam_size=2, max_length_ratio=1.0, max_length_extra=2)
    moe = core.MoEConfig(2, core.Task(num_tasks=2, top_k=1), core.FFN(hidden_dim=8))
    module = translator(data, moe, transformer=TRANSFORMER, decoder_moe_blocks=[0], decode=search)
    options = {"pairs": list(data.pairs), "root": str(folder), "train_files": "train"}
    run, exported = tmp_path / "run", tmp_path / "exported"
    write_run(run, strong(module), {"class_path": "TranslationData", "init_args": {"dataset": "moses", **options}})
    assert main(["export", "--ckpt_path", str(run), "--output", str(exported)]) == 0
    names = ["decoder.onnx", "encoder.onnx", "export.json", "subwords.model"]
    assert sorted(path.name for path in exported.iterdir()) == names
    asked = ["--data.text", json.dumps(TEXTS), "--data.predict_pair", "en-fr"]
    for own in ([], GREEDY, ["--model.decode.num_best", "2"]):
        expected = lines(capsys, "predict", "--ckpt_path", str(run), *asked, *own)
        assert lines(capsys, "predict", "--onnx", str(exported), *asked, *own) == expected
        assert len(set(expected)) > 2
    code = script("docs/serving.md", "python translate.py")
    expected = lines(capsys, "predict", "--onnx", str(exported), *asked, *GREEDY)
    assert [output(code, str(exported), "en-fr", text) for text in TEXTS] == expected


def test_continuations_of_predict_and_of_the_script_are_those_of_the_checkpoint(folder, tmp_path, capsys):
    search = DecodeConfig("greedy", max_length_ratio=0.0, max_length_extra=9)
    module = LanguageModeler(copy_data(folder, ("de", "fr")).subwords, TRANSFORMER, decode=search)
    options = {"dataset": "text", "root": str(folder), "train_files": "train.en"}
    run, exported = tmp_path / "run", tmp_path / "exported"
    write_run(run, strong(module), {"class_path": "TextData", "init_args": options})
    assert main(["export", "--ckpt_path", str(run), "--output", str(exported)]) == 0
    asked = ["--data.text", json.dumps(TEXTS)]
    expected = lines(capsys, "predict", "--ckpt_path", str(run), *asked)
    assert lines(capsys, "predict", "--onnx", str(exported), *asked) == expected
    code = script("docs/serving.md", "python continue.py")
    assert [output(code, str(exported), text) for text in TEXTS] == expected
    model = ExportedModel.read(exported).load()
    assert not list(model.parameters())
    assert model.predict(TEXTS) == expected
