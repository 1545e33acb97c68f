"""``moesaic predict`` of a trained translator, on a machine that has the checkpoint and nothing of the corpus."""

import io
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from copying import copy_data, write_copies
from predicted import written

import core
from apps.cli import main
from apps.cli.errors import UsageError
from apps.cli.request import Request
from apps.cli.train import build
from apps.cli.write import partial as partial_file
from apps.cli.write.partial import Partial
from apps.data.subwords import SubwordConfig
from apps.nlp.translation.data import TranslationData
from apps.nlp.translation.module import Translations, Translator
from apps.train.optim.optimizers import OptimizerConfig

BEST = "runs/copies/checkpoints/best.ckpt"
CONFIG = """
model:
  class_path: Translator
  init_args:
    transformer: {size: nano, dim: 32, hidden_dim: 32, encoder_layers: 1, decoder_layers: 1}
    moe: {num_experts: 4, expert: {class_path: core.FFN, init_args: {hidden_dim: 16}}}
    encoder_moe_blocks: none
    decoder_moe_blocks: all
    report: null
data:
  class_path: TranslationData
  init_args: {dataset: moses, root: corpus, cache_dir: cache, pairs: [en-de, en-fr], train_files: train, val_files: val,
              test_files: test, tokenizer: {vocab_size: 300}}
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, logger: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run; a test of the checkpoint reads what the training has encoded."""
    folder = tmp_path_factory.mktemp("copies")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("corpus").mkdir()
        write_copies(Path("corpus"), ("de", "fr"))
        Path("copies.yaml").write_text(CONFIG)
        few = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
        assert main(["fit", "--config", "copies.yaml", *few]) == 0
        assert main(["test", "--config", "copies.yaml", "--trainer.limit_test_batches", "1"]) == 0
        assert len(list(Path("cache/text").iterdir())) == 1
        shutil.rmtree("corpus")
        shutil.rmtree("cache")
    return folder


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Translator:
    return Translator.load_from_checkpoint(trained / BEST)


@pytest.fixture(autouse=True)
def _in_the_folder(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(trained)
    capsys.readouterr()


def predict(capsys: pytest.CaptureFixture, *flags: str) -> list[str]:
    """The lines on stdout."""
    assert main(["predict", "--config", "copies.yaml", "--data.predict_pair", "en-de", *flags]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n")


def test_text_a_file_and_standard_input_are_translated_alike(capsys, monkeypatch):
    lines = ["red blue green black", "", "blue", "black black green red", "", "green"]
    Path("in.txt").write_text("\n".join(lines) + "\n")
    from_file = predict(capsys, "--data.predict_file", "in.txt")
    assert [line == "" for line in from_file] == [line == "" for line in lines]
    assert predict(capsys, "--data.text", str(lines)) == from_file
    assert predict(capsys, "--data.text", lines[2]) == [from_file[2]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("in.txt").read_bytes())))
    assert predict(capsys, "--data.predict_file", "-", "--data.predict_lines", "4") == from_file
    assert not Path("cache").exists()
    # A line is printed before the next is read; one who interrupts it gets no advice on training.
    shown: list[str] = []

    def typed():
        for line in (b"blue\n", b"green\n", b"red\n"):
            shown.append(capsys.readouterr().out)
            yield line
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=typed()))
    flags = ["--data.predict_pair", "en-de", "--data.predict_file", "-", "--data.predict_lines", "1"]
    assert main(["predict", "--config", "copies.yaml", *flags]) == 130
    assert shown == ["", f"{from_file[2]}\n", f"{from_file[5]}\n"]
    assert capsys.readouterr().err.endswith("\ninterrupted\n")


def test_what_is_wrong_is_one_line_and_what_came_before_it_is_printed(capsys):
    flags = ["predict", "--config", "copies.yaml", "--data.predict_pair", "en-de", "--data.predict_file"]
    Path("bad.txt").write_bytes(b"red\nblue red\ngreen\n\xff\xfe\nblue\n")
    assert main([*flags, "bad.txt"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert "line 4" in shown.err.splitlines()[-1]
    assert main([*flags, "nowhere.txt"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: predict_file='nowhere.txt' cannot be read: No such file or directory"
    assert main(["predict", "--config", "copies.yaml", "--data.text", "red"]) == 1
    assert "must name one of en-de, en-fr" in capsys.readouterr().err


def data_of(model: Translator, **options) -> TranslationData:
    known = {"pairs": model.pairs, "subwords": model.subwords, "predict_pair": "en-de", "train_files": "train"}
    return TranslationData("moses", **{**known, **options})


LINES = ["red blue green black", "", "blue", "black black green red", "green", "red", "blue black"]


def test_a_list_of_texts_is_translated_as_the_command_translates_it(loaded, capsys):
    printed = predict(capsys, "--data.text", str(LINES))
    assert loaded.predict(LINES, "en-de") == printed
    assert loaded.predict([], "en-de") == []
    assert loaded.predict(tuple(LINES[2:3]), "en-de") == printed[2:3]
    search = {"method": "greedy", "max_length_ratio": 0.5}
    flags = [f"--model.decode.{name}={value}" for name, value in search.items()]
    assert loaded.predict(LINES, "en-de", **search) == predict(capsys, *flags, "--data.text", str(LINES)) != printed
    drawn = loaded.predict(LINES, "en-fr", method="sample", seed=1)
    assert drawn == loaded.predict(LINES, "en-fr", method="sample", seed=1) != loaded.predict(LINES, "en-fr")
    for pair, options, message in (
        ([], {}, r"^pair must name one of en-de, en-fr$"),
        (["de-en"], {}, "pair='de-en' is not one of en-de, en-fr"),
        (
            ["en-de"],
            {"num_return_sequences": 2},
            "num_return_sequences=2: predict returns one text each; candidates has",
        ),
        (["en-de"], {"max_length": 3}, "max_length=3 must be at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.predict(["red"], *pair, **options)
    # The best candidates of a line come with their scores.
    candidates = loaded.candidates(LINES, "en-de", num_return_sequences=3)
    assert [len(own) for own in candidates] == [1 if not line else 3 for line in LINES]
    assert candidates[1] == [("", 0.0)]
    of_each = predict(capsys, "--data.text", str(LINES), "--model.decode.num_return_sequences", "3")
    assert of_each == [f"{i}\t{c.score:.4f}\t{c.text}" for i, own in enumerate(candidates, 1) for c in own]
    assert all(a.score >= b.score for own in candidates for a, b in itertools.pairwise(own))
    assert [own[0].text for own in candidates] == printed


@pytest.mark.parametrize("name", ["out.txt", "out.jsonl"])
def test_a_file_goes_on_where_a_killed_run_stopped_to_the_same_lines(name, tmp_path, monkeypatch, caplog, loaded):
    caplog.set_level("INFO")
    Path("in.txt").write_text("\n".join(LINES) + "\n")
    data = data_of(loaded, predict_file="in.txt", predict_lines=2)
    monkeypatch.setattr(partial_file, "_SAVED", -1.0)  # noted after each chunk
    whole, path, partial = (tmp_path / own for own in (f"whole-{name}", name, f"{name}.partial"))
    assert written(loaded, data, whole) == (7, 0)
    translated, translate, last = [], loaded.translate, [4]

    def stopped(batch, *rest, **how):
        if {*last} & {*batch.index_B.tolist()}:
            raise KeyboardInterrupt
        translated.extend(batch.index_B.tolist())
        return translate(batch, *rest, **how)

    monkeypatch.setattr(loaded, "translate", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(loaded, data, path)
    assert not path.exists()
    assert partial.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:4])
    assert caplog.messages[-1] == f"4 predictions are in {partial}: a run like this one continues after them"
    with open(partial, "a") as file:
        file.write("half a li")  # what a kill leaves behind the last note
    last.clear()
    translated.clear()
    assert written(loaded, data, path) == (7, 4)
    assert sorted(translated) == [4, 5, 6]
    assert path.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {name, whole.name}
    expected, lines = loaded.predict(LINES, "en-de"), path.read_text().splitlines()
    if name == "out.jsonl":
        rows = [json.loads(line) for line in lines]
        assert [(row["source"], row["translation"]) for row in rows] == [*zip(LINES, expected, strict=True)]
        assert list(rows[0]) == ["index", "source", "translation", "candidates", "scores"]
    else:
        assert lines == expected


def test_a_file_of_another_run_is_never_replaced_or_gone_on_with_in_silence(tmp_path, loaded, monkeypatch):
    path, bad = tmp_path / "other.txt", {"predict_file": "bad.txt", "predict_lines": 1}
    Path("in.txt").write_text("red\nblue\n")
    Path("bad.txt").write_bytes(b"red\nblue\n\xff\ngreen\n")
    with pytest.raises(ValueError, match="line 3: byte 0xff"):  # in the first chunk: nothing is left behind
        written(loaded, data_of(loaded, predict_file="bad.txt"), path)
    assert not list(tmp_path.glob("other*"))
    with pytest.raises(ValueError, match="line 3: byte 0xff"):
        written(loaded, data_of(loaded, **bad), path)
    for options, what in (
        ({"predict_file": "in.txt"}, "input is not this one's"),
        ({"predict_pair": "en-fr"}, "predict_pair is en-de, not en-fr"),
    ):
        with pytest.raises(ValueError, match=rf"other\.txt\.partial is of another run, whose {what}: take it away"):
            written(loaded, data_of(loaded, **{**bad, **options}), path)
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "decode", replace(loaded.decode, num_beams=2))
        with pytest.raises(ValueError, match=r"whose decode\.num_beams is 5, not 2"):
            written(loaded, data_of(loaded, **bad), path)
    other = Translator.load_from_checkpoint(BEST, moe=replace(loaded.moe, router=core.TokenChoice(top_k=1)))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"other\.txt\.partial is of another run, whose model is not this one's: take"):
        written(other, data_of(other, **bad, bad_lines="skip"), path)
    # How it was trained has no part in it, and what came before the error is the same.
    same = Translator.load_from_checkpoint(BEST, optimizer=OptimizerConfig(lr=0.5), ema_decay=0.5)
    assert written(same, data_of(same, **bad, bad_lines="skip"), path) == (4, 2)
    assert path.read_text().splitlines() == loaded.predict(["red", "blue", "", "green"], "en-de")


def test_predictions_are_text_as_it_is_read(capsys, monkeypatch):
    batch = Translations(torch.tensor([1, 0]), ["en-de"] * 2, ["größer", "a"], ["ß", "b"], torch.zeros(2), [[], []])
    cli = build("predict", ["--config", "copies.yaml"])

    def predict(**_):
        cli.trainer.callbacks[-1].on_predict_batch_end(cli.trainer, cli.model, batch, None, 0)

    monkeypatch.setattr(cli.trainer, "predict", predict)
    cli.execute()
    first = '{"index": 0, "pair": "en-de", "source": "a", "translation": "b", "score": 0.0, "alternatives": []}'
    lines = Path("runs/copies/predictions.jsonl").read_text("utf-8").splitlines()
    assert lines == capsys.readouterr().out.splitlines()[:2]
    assert (lines[0], '"source": "größer", "translation": "ß"' in lines[1]) == (first, True)
    with Partial(Path("out.txt"), {"input": ["a"]}) as own:  # two runs do not write one file
        with pytest.raises(ValueError, match=r"another run is writing .*out\.txt\.partial"):
            Partial(Path("out.txt"), {"input": ["a"]}, overwrite=True)
        own.file.write(b"whole\n")
        own.become(Path("out.txt"))
    assert Path("out.txt").read_text() == "whole\n"
    assert [*Path().glob("*out*")] == [Path("out.txt")]


def test_subwords_and_pairs_that_are_not_the_checkpoint_s_are_refused(loaded, capsys, tmp_path):
    other = copy_data(tmp_path, ("de", "fr"), tokenizer=SubwordConfig("unigram", vocab_size=280)).subwords
    written = {"subwords": {"models": list(other.models), "languages": list(other.languages)}}
    Path("other.yaml").write_text(yaml.safe_dump({"data": {"init_args": written}}))
    flags = ["predict", "--config", "copies.yaml", "--ckpt_path", BEST, "--data.text", "red"]
    digests = f"subwords {loaded.subwords.digest}, and the data's are {other.digest}: leave data.subwords out"
    for given, message in (
        (["--config", "other.yaml"], f"best.ckpt is of {digests}"),
        (["--data.pairs", "[en-de]"], "and the data's are ['en-de']: leave data.pairs out"),
    ):
        assert main([*flags, *given]) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_how_subwords_are_learned_is_not_asked_again_of_a_checkpoint():
    command = ["--config", "copies.yaml", "--data.text", "red", "--ckpt_path", BEST]
    for given, option in (
        (["--data.tokenizer.vocab_size", "280"], "data.tokenizer.vocab_size=280"),
        (["--data.init_args.tokenizer.joint=false"], "data.tokenizer.joint=False"),
        (["--data.tokenizer", "{kind: unigram}"], "data.tokenizer={'kind': 'unigram'}"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(option)} has no effect: {BEST} brings its subwords along; "):
            Request.read("predict", [*command, *given])
    # As the run was started: a command line may be repeated.
    Request.read("predict", [*command, "--data.tokenizer.vocab_size", "300", "--data.tokenizer.kind=bpe"])
    Request.read("fit", ["--config", "copies.yaml", "--data.root", ".", "--data.tokenizer.vocab_size", "280"])
