"""``moesaic predict`` of a trained translator, on a machine that has the checkpoint and nothing of the corpus."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from copying import copy_data, write_copies

from apps.cli import UsageError, main
from apps.cli.request import Request
from apps.cli.train import build
from apps.nlp.module import Translations
from apps.nlp.subwords import SubwordConfig

CONFIG = """
model:
  class_path: apps.nlp.module.Translator
  init_args:
    transformer: {size: nano, dim: 32, hidden_dim: 32, encoder_layers: 1, decoder_layers: 1}
    moe: {num_experts: 4, expert: {class_path: core.FFN, init_args: {hidden_dim: 16}}}
    encoder_moe_layers: none
    decoder_moe_layers: all
    report: null
data:
  class_path: apps.nlp.data.TranslationData
  init_args:
    dataset: moses
    root: corpus
    cache_dir: cache
    pairs: [en-de, en-fr]
    train_files: train
    val_files: val
    test_files: test
    tokenizer: {vocab_size: 300}
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, logger: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder with a finished run; how many times the corpus was encoded in training and a test of the checkpoint."""
    folder = tmp_path_factory.mktemp("copies")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("corpus").mkdir()
        write_copies(Path("corpus"), ("de", "fr"))
        Path("copies.yaml").write_text(CONFIG)
        assert main(["fit", "--config", "copies.yaml"]) == 0
        assert main(["test", "--config", "copies.yaml"]) == 0
        encoded = len(list(Path("cache/text").iterdir()))
        shutil.rmtree("corpus")
        shutil.rmtree("cache")
    return SimpleNamespace(folder=folder, encoded=encoded)


@pytest.fixture(autouse=True)
def _in_the_folder(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(trained.folder)
    capsys.readouterr()


def predict(capsys: pytest.CaptureFixture, *flags: str) -> list[str]:
    """The lines on stdout."""
    assert main(["predict", "--config", "copies.yaml", "--data.predict_pair", "en-de", *flags]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n")


def test_a_test_of_the_checkpoint_reads_what_the_training_encoded(trained):
    assert trained.encoded == 1


def test_text_a_file_and_standard_input_are_translated_alike(capsys, monkeypatch):
    lines = ["red blue green black", "", "blue", "black black green red", "", "green"]
    Path("in.txt").write_text("\n".join(lines) + "\n")
    from_file = predict(capsys, "--data.predict_file", "in.txt")
    assert [line == "" for line in from_file] == [line == "" for line in lines]
    assert predict(capsys, "--data.text", str(lines)) == from_file
    assert predict(capsys, "--data.text", lines[2]) == [from_file[2]]
    for chunk in ("1", "4"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("in.txt").read_bytes())))
        assert predict(capsys, "--data.predict_file", "-", "--data.predict_lines", chunk) == from_file
    assert not Path("cache").exists()


def test_a_line_is_printed_before_the_next_is_read(capsys, monkeypatch):
    shown: list[str] = []

    def typed():
        for line in (b"red blue\n", b"green\n", b"black\n"):
            shown.append(capsys.readouterr().out)
            yield line

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=typed()))
    last = predict(capsys, "--data.predict_file", "-", "--data.predict_lines", "1")
    assert len(last) == 1
    assert [text.count("\n") for text in shown] == [0, 1, 1]


def test_what_is_wrong_is_one_line_and_what_came_before_it_is_printed(capsys):
    Path("bad.txt").write_bytes(b"red\n\xff\xfe\nblue\n")
    flags = ["predict", "--config", "copies.yaml", "--data.predict_pair", "en-de", "--data.predict_file"]
    assert main([*flags, "bad.txt", "--data.predict_lines", "1"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert "line 2" in shown.err.splitlines()[-1]
    Path("bad.txt").write_bytes(b"red\nblue red\ngreen\n\xff\xfe\nblue\n")
    assert main([*flags, "bad.txt"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert "line 4" in shown.err.splitlines()[-1]
    assert main([*flags, "nowhere.txt"]) == 1
    assert capsys.readouterr().err == "error: predict_file='nowhere.txt' cannot be read: No such file or directory\n"
    assert main(["predict", "--config", "copies.yaml", "--data.text", "red"]) == 1
    assert "must name one of en-de, en-fr" in capsys.readouterr().err


def test_an_interrupted_prediction_gives_no_advice_on_training(capsys, monkeypatch):
    def typed():
        yield b"red blue\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=typed()))
    flags = ["--data.predict_pair", "en-de", "--data.predict_file", "-", "--data.predict_lines", "1"]
    assert main(["predict", "--config", "copies.yaml", *flags]) == 130
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert shown.err.endswith("\ninterrupted\n")


def test_predictions_are_text_as_it_is_read(capsys, monkeypatch):
    predictions = [
        Translations(torch.tensor([1, 0]), ["en-de"] * 2, ["größer", "a"], ["ß", "b"], torch.zeros(2), [[], []])
    ]
    cli = build("predict", ["--config", "copies.yaml"])
    monkeypatch.setattr(cli.trainer, "predict", lambda *a, **k: predictions)
    cli.execute()
    first = '{"index": 0, "pair": "en-de", "source": "a", "translation": "b", "score": 0.0, "alternatives": []}'
    lines = Path("runs/copies/predictions.jsonl").read_text("utf-8").splitlines()
    assert lines == capsys.readouterr().out.splitlines()[:2]
    assert lines[0] == first
    assert '"source": "größer", "translation": "ß"' in lines[1]


def test_subwords_and_pairs_that_are_not_the_checkpoint_s_are_refused(capsys, tmp_path):
    other = copy_data(tmp_path, ("de", "fr"), tokenizer=SubwordConfig("unigram", vocab_size=280)).subwords
    written = {"subwords": {"models": list(other.models), "languages": list(other.languages)}}
    Path("other.yaml").write_text(yaml.safe_dump({"data": {"init_args": written}}))
    own = build("predict", ["--config", "copies.yaml", "--data.text", "red"]).model.subwords
    flags = ["predict", "--config", "copies.yaml", "--ckpt_path", "runs/copies/checkpoints/best.ckpt"]
    capsys.readouterr()
    assert main([*flags, "--config", "other.yaml", "--data.text", "red"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    told = f"best.ckpt is of subwords {own.digest}, and the data's are {other.digest}: leave data.subwords out"
    assert line.endswith(told)
    assert main([*flags, "--data.pairs", "[en-de]", "--data.text", "red"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("and the data's are ['en-de']: leave data.pairs out")


def test_how_subwords_are_learned_is_not_asked_again_of_a_checkpoint(capsys):
    best = "runs/copies/checkpoints/best.ckpt"
    command = ["--config", "copies.yaml", "--data.text", "red", "--ckpt_path", best]
    for given, told in (
        (["--data.tokenizer.vocab_size", "280"], "data.tokenizer.vocab_size=280"),
        (["--data.init_args.tokenizer.joint=false"], "data.tokenizer.joint=False"),
        (["--data.tokenizer", "{kind: unigram}"], "data.tokenizer={'kind': 'unigram'}"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(told)} has no effect: {best} brings its subwords along; l"):
            Request.read("predict", [*command, *given])
    # As the run was started: a command line may be repeated.
    assert predict(capsys, "--data.text", "red", "--data.tokenizer.vocab_size", "300", "--data.tokenizer.kind=bpe")
    Request.read("fit", ["--config", "copies.yaml", "--data.tokenizer.vocab_size", "280"])
