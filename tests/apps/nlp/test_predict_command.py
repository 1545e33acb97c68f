"""``moesaic predict`` of a trained translator, on a machine that has the checkpoint and nothing of the corpus."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from copying import copy_data, write_copies
from places import environment
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

CONFIG = """
model:
  class_path: apps.nlp.translation.module.Translator
  init_args:
    transformer: {size: nano, dim: 32, hidden_dim: 32, encoder_layers: 1, decoder_layers: 1}
    moe: {num_experts: 4, expert: {class_path: core.FFN, init_args: {hidden_dim: 16}}}
    encoder_moe_blocks: none
    decoder_moe_blocks: all
    report: null
data:
  class_path: apps.nlp.translation.data.TranslationData
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
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: predict_file='nowhere.txt' cannot be read: No such file or directory"
    assert main(["predict", "--config", "copies.yaml", "--data.text", "red"]) == 1
    assert "must name one of en-de, en-fr" in capsys.readouterr().err


def load() -> Translator:
    return Translator.load_from_checkpoint("runs/copies/checkpoints/best.ckpt")


def data_of(model: Translator, **options) -> TranslationData:
    known = {"pairs": model.pairs, "subwords": model.subwords, "predict_pair": "en-de", "train_files": "train"}
    return TranslationData("moses", **{**known, **options})


LINES = ["red blue green black", "", "blue", "black black green red", "green", "red", "blue black"]


def test_a_list_of_texts_is_translated_as_the_command_translates_it(capsys):
    model = load()
    printed = predict(capsys, "--data.text", str(LINES))
    assert model.predict(LINES, "en-de") == printed
    assert model.predict([], "en-de") == []
    assert model.predict(tuple(LINES[2:3]), "en-de") == printed[2:3]
    for name, value in (("method", "greedy"), ("num_beams", 2), ("max_length_ratio", 0.5)):
        flags = (f"--model.decode.{name}", str(value), "--data.text", str(LINES))
        assert model.predict(LINES, "en-de", **{name: value}) == predict(capsys, *flags)
    drawn = model.predict(LINES, "en-fr", method="sample", seed=1)
    assert drawn == model.predict(LINES, "en-fr", method="sample", seed=1) != model.predict(LINES, "en-fr")
    with pytest.raises(ValueError, match=r"^pair must name one of en-de, en-fr$"):
        model.predict(["red"])
    with pytest.raises(ValueError, match="pair='de-en' is not one of en-de, en-fr"):
        model.predict(["red"], "de-en")
    with pytest.raises(
        ValueError, match="num_return_sequences=2: predict returns one text each; candidates has the others"
    ):
        model.predict(["red"], "en-de", num_return_sequences=2)
    with pytest.raises(ValueError, match="max_length=3 must be at least 4"):
        model.predict(["red"], "en-de", max_length=3)


def test_the_best_candidates_of_a_line_come_with_their_scores(capsys):
    candidates = load().candidates(LINES, "en-de", num_return_sequences=3)
    assert [len(own) for own in candidates] == [1 if not line else 3 for line in LINES]
    assert candidates[1] == [("", 0.0)]
    printed = predict(capsys, "--data.text", str(LINES), "--model.decode.num_return_sequences", "3")
    assert printed == [f"{i}\t{c.score:.4f}\t{c.text}" for i, own in enumerate(candidates, 1) for c in own]
    assert all(a.score >= b.score for own in candidates for a, b in itertools.pairwise(own))
    assert [own[0].text for own in candidates] == predict(capsys, "--data.text", str(LINES))


@pytest.mark.slow
def test_a_script_that_translates_hears_nothing_of_lightning():
    script = (
        "from apps.nlp.translation.module import Translator\n"
        "print(len(Translator.load_from_checkpoint('runs/copies/checkpoints/best.ckpt').predict(['red'], 'en-de')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize("name", ["out.txt", "out.jsonl"])
def test_a_file_goes_on_where_a_killed_run_stopped_to_the_same_lines(name, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    model = load()
    Path("in.txt").write_text("\n".join(LINES) + "\n")
    options = {"predict_file": "in.txt", "predict_lines": 2}
    monkeypatch.setattr(partial_file, "_SAVED", -1.0)  # noted after each chunk
    whole, path = tmp_path / f"whole-{name}", tmp_path / name
    assert written(model, data_of(model, **options), whole) == (7, 0)
    translated: list[int] = []
    translate = model.translate

    def stopped(batch, *rest):
        if 4 in batch.index_B:
            raise KeyboardInterrupt
        return translate(batch, *rest)

    monkeypatch.setattr(model, "translate", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(model, data_of(model, **options), path)
    assert not path.exists()
    partial = tmp_path / f"{name}.partial"
    assert partial.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:4])
    assert caplog.messages[-1] == f"4 predictions are in {partial}: a run like this one continues after them"
    with open(partial, "a") as file:
        file.write("half a li")  # what a kill leaves behind the last note

    def counted(batch, *rest, **how):
        translated.extend(batch.index_B.tolist())
        return translate(batch, *rest, **how)

    monkeypatch.setattr(model, "translate", counted)
    assert written(model, data_of(model, **options), path) == (7, 4)
    assert sorted(translated) == [4, 5, 6]
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, f"whole-{name}"])
    if name == "out.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["source"] for row in rows] == LINES
        assert [row["translation"] for row in rows] == model.predict(LINES, "en-de")
        assert list(rows[0]) == ["index", "source", "translation", "candidates", "scores"]
    else:
        assert path.read_text().splitlines() == model.predict(LINES, "en-de")


def test_a_file_of_another_run_is_never_replaced_or_gone_on_with_in_silence(tmp_path, monkeypatch):
    model, path = load(), tmp_path / "out.txt"
    Path("in.txt").write_text("red\nblue\n")
    Path("bad.txt").write_bytes(b"red\nblue\n\xff\ngreen\n")
    path = tmp_path / "other.txt"
    with pytest.raises(ValueError, match="line 3: byte 0xff"):  # in the first chunk: nothing is left behind
        written(model, data_of(model, predict_file="bad.txt"), path)
    assert not list(tmp_path.glob("other*"))
    with pytest.raises(ValueError, match="line 3: byte 0xff"):
        written(model, data_of(model, predict_file="bad.txt", predict_lines=1), path)
    for options, what in (
        ({"predict_file": "in.txt"}, "input is not this one's"),
        ({"predict_file": "bad.txt", "predict_pair": "en-fr"}, "predict_pair is en-de, not en-fr"),
    ):
        with pytest.raises(ValueError, match=rf"other\.txt\.partial is of another run, whose {what}: take it away"):
            written(model, data_of(model, predict_lines=1, **options), path)
    model.decode = replace(model.decode, num_beams=2)
    with pytest.raises(ValueError, match=r"whose decode\.num_beams is 5, not 2"):
        written(model, data_of(model, predict_file="bad.txt", predict_lines=1), path)
    model.decode = replace(model.decode, num_beams=5)
    skipping = {"predict_file": "bad.txt", "predict_lines": 1, "bad_lines": "skip"}
    assert written(model, data_of(model, **skipping), path) == (4, 2)  # what came before the error is the same
    assert path.read_text().splitlines() == model.predict(["red", "blue", "", "green"], "en-de")


def test_a_stopped_run_is_gone_on_with_only_by_a_model_of_the_same_options(tmp_path):
    path, options = tmp_path / "out.txt", {"predict_file": "bad.txt", "predict_lines": 1}
    Path("bad.txt").write_bytes(b"red\nblue\n\xff\ngreen\n")
    model = load()
    with pytest.raises(ValueError, match="line 3: byte 0xff"):
        written(model, data_of(model, **options), path)
    best = "runs/copies/checkpoints/best.ckpt"
    other = Translator.load_from_checkpoint(best, moe=replace(model.moe, router=core.TokenChoice(top_k=1)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"out\.txt\.partial is of another run, whose model is not this one's: take"):
        written(other, data_of(other, **options, bad_lines="skip"), path)
    same = Translator.load_from_checkpoint(best, optimizer=OptimizerConfig(lr=0.5), ema_decay=0.5)
    assert written(same, data_of(same, **options, bad_lines="skip"), path) == (4, 2)


def test_two_runs_do_not_write_one_file(tmp_path):
    made_of = {"input": ["a"]}
    with Partial(tmp_path / "out.txt", made_of) as first:
        with pytest.raises(ValueError, match=r"another run is writing .*out\.txt\.partial"):
            Partial(tmp_path / "out.txt", made_of, overwrite=True)
        first.file.write(b"whole\n")
        first.become(tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "whole\n"
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.txt"]


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

    def predict(**_):
        for batch in predictions:
            cli.trainer.callbacks[-1].on_predict_batch_end(cli.trainer, cli.model, batch, None, 0)

    monkeypatch.setattr(cli.trainer, "predict", predict)
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
    *_, line = capsys.readouterr().err.splitlines()
    message = f"best.ckpt is of subwords {own.digest}, and the data's are {other.digest}: leave data.subwords out"
    assert line.endswith(message)
    assert main([*flags, "--data.pairs", "[en-de]", "--data.text", "red"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith("and the data's are ['en-de']: leave data.pairs out")


def test_how_subwords_are_learned_is_not_asked_again_of_a_checkpoint(capsys):
    best = "runs/copies/checkpoints/best.ckpt"
    command = ["--config", "copies.yaml", "--data.text", "red", "--ckpt_path", best]
    for given, option in (
        (["--data.tokenizer.vocab_size", "280"], "data.tokenizer.vocab_size=280"),
        (["--data.init_args.tokenizer.joint=false"], "data.tokenizer.joint=False"),
        (["--data.tokenizer", "{kind: unigram}"], "data.tokenizer={'kind': 'unigram'}"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(option)} has no effect: {best} brings its subwords along; "):
            Request.read("predict", [*command, *given])
    # As the run was started: a command line may be repeated.
    assert predict(capsys, "--data.text", "red", "--data.tokenizer.vocab_size", "300", "--data.tokenizer.kind=bpe")
    Request.read("fit", ["--config", "copies.yaml", "--data.root", ".", "--data.tokenizer.vocab_size", "280"])
