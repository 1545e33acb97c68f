"""``moesaic predict`` of a model that has lines to say, and what data take from a checkpoint."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml
from pyarrow import parquet
from tiny_app import Names

from apps.cli import main
from apps.cli.train import build

CONFIG = """
model: {class_path: tiny_app.NamingModule}
data: {class_path: tiny_app.NamedData}
trainer: {accelerator: cpu, max_epochs: 40, enable_progress_bar: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, whose training points have gone."""
    folder = tmp_path_factory.mktemp("named")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("named.yaml").write_text(CONFIG)
        Path("names.txt").write_text("east north south")
        assert main(["fit", "--config", "named.yaml", "--model.optimizer.lr", "0.05"]) == 0
        Path("names.txt").unlink()
    return folder


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return "--config=named.yaml"


# The three classes lie at 0, 120 and 240 degrees.
BEST = "--ckpt_path=runs/named/checkpoints/best.ckpt"
POINTS = '["-0.5 0.9", "1 0", "-0.5 -0.9", "1 0.1"]'


def test_lines_are_all_that_goes_to_stdout_in_their_order_those_before_an_error_too(run, capsys):
    assert main(["predict", run, "--data.text", POINTS]) == 0
    shown = capsys.readouterr()
    assert shown.out == "north\neast\nsouth\neast\n"
    assert "4 predictions in" in shown.err
    assert not Path("runs/named/predictions.jsonl").exists()
    assert main(["predict", run, "--data.text", '["1 0", "-0.5 0.9", "far away"]']) == 1
    shown = capsys.readouterr()
    assert shown.out == "east\nnorth\n"
    assert shown.err.splitlines()[-1].startswith("error: ")


def test_predictions_go_to_a_file_of_any_format(run, capsys, tmp_path):
    argv = ["predict", run, "--data.text", POINTS, "--output"]
    assert main([*argv, str(tmp_path / "names.txt")]) == 0
    assert capsys.readouterr().out == f"4 predictions in {tmp_path / 'names.txt'}\n"
    assert (tmp_path / "names.txt").read_text() == "north\neast\nsouth\neast\n"
    assert main([*argv, str(tmp_path / "names.txt")]) == 2
    assert f"{tmp_path / 'names.txt'} exists: --overwrite replaces it" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "names.csv")]) == 0
    first = '{"index": 0, "name": "north"}\n{"index": 1, "name": "east"}\n{"index": 2, "name": "south"}\n'
    assert capsys.readouterr().out == first + f"4 predictions in {tmp_path / 'names.csv'}\n"
    assert (tmp_path / "names.csv").read_text() == "index,name\n0,north\n1,east\n2,south\n3,east\n"
    assert main([*argv, str(tmp_path / "names.jsonl")]) == 0
    assert (tmp_path / "names.jsonl").read_text().startswith(first)
    assert main([*argv, str(tmp_path / "names.parquet")]) == 0
    assert parquet.read_table(tmp_path / "names.parquet").column("name").to_pylist()[2:] == ["south", "east"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_goes_on_after_the_predictions_of_a_stopped_run(run, capsys, tmp_path):
    path = tmp_path / "names.csv"
    argv = ["predict", run, "--output", str(path), "--data.text"]
    assert main([*argv, '["1 0", "-0.5 0.9", "far away"]']) == 1
    assert not path.exists()
    assert path.with_name("names.csv.partial").read_text().count("\n") == 2
    # Other inputs are another run's.
    assert main([*argv, POINTS]) == 1
    assert "names.csv.partial is of another run, whose input is not this one's: take it away" in capsys.readouterr().err
    assert main([*argv, POINTS, "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith(f"4 predictions in {path}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["names.csv"]


TEXTS = ["- Yes: no", "[a, b]", "# not a comment", "null", "12", '["a", 1]', "'quoted'", "a\nb", "Ж😀", "a\x85b"]
WAYS = ["--data.text", "--data.text=", "--data.init_args.text="]


@pytest.mark.parametrize(("text", "way"), zip(TEXTS, itertools.cycle(WAYS), strict=False))
def test_a_text_is_taken_as_it_is_written(run, text, way):
    flags = [way + text] if "=" in way else [way, text]
    assert build("predict", [run, *flags]).datamodule.text == [text]


def test_a_list_of_texts_stays_one_and_what_is_no_text_is_refused(run, capsys):
    assert build("predict", [run, "--data.text", POINTS]).datamodule.text == json.loads(POINTS)
    assert build("predict", [run, "--data.text=['it''s', \"a, b\"]"]).datamodule.text == ["it's", "a, b"]
    assert main(["predict", run, "--data.text", "\udce4"]) == 2
    assert "the text of --data.text is not valid UTF-8" in capsys.readouterr().err


def test_several_processes_do_not_predict(run, capsys):
    assert main(["predict", run, "--trainer.devices", "2", "--trainer.strategy", "ddp"]) == 2
    assert "predict runs in one process, not in 2" in capsys.readouterr().err


def test_a_prediction_that_ends_in_an_error_leaves_no_folder(run, capsys, monkeypatch):
    def rows(self: object) -> None:
        raise ValueError("no rows")

    monkeypatch.setattr("tiny_app.NamedData.predict_dataloader", rows)
    assert main(["predict", run, BEST, "--run_dir=elsewhere"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no rows"
    assert not Path("elsewhere").exists()


def test_data_take_from_the_checkpoint_what_is_not_written(run):
    for command in ("test", "predict", "validate"):
        data = build(command, [run]).datamodule
        assert data.names == Names(("east", "north", "south"))
        assert data.num_classes == 3
    assert build("fit", [run, "--ckpt_path", "last"]).datamodule.names.words[0] == "east"
    Path("null.yaml").write_text("data: {class_path: tiny_app.NamedData, init_args: {names: null, num_classes: 3}}")
    assert build("test", [run, "--config", "null.yaml", BEST]).datamodule.names.words[0] == "east"
    Path("named2.yaml").write_text("model: {class_path: tiny_app.NamingModule}")
    assert (
        build("test", ["--config", "named2.yaml", "--data", "tiny_app.NamedData", BEST]).datamodule.names.words[0]
        == "east"
    )


def test_without_a_checkpoint_data_take_nothing(run, capsys):
    assert main(["fit", run]) == 1
    assert capsys.readouterr().err == "error: names.txt: No such file or directory\n"


def test_what_is_written_by_hand_must_be_the_checkpoint_s(run, capsys):
    Path("other.yaml").write_text("data: {class_path: tiny_app.NamedData, init_args: {names: {words: [a, b, c]}}}")
    there, here = Names(("east", "north", "south")).digest, Names(("a", "b", "c")).digest
    for argv in ([run, "--config", "other.yaml", BEST], [run, "--data.names.words", "[a, b, c]"]):
        assert main(["test", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"best.ckpt is of names {there}, and the data's are {here}: leave data.names out")
    assert main(["test", run, "--data.names.words", "[east, north, south]"]) == 0
    capsys.readouterr()
    assert main(["test", run, "--data.num_classes", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("best.ckpt is of num_classes 3, and the data's are 4: leave data.num_classes out")


def test_a_resumed_run_is_described_as_an_unbroken_one(trained, tmp_path, monkeypatch):
    """What its data take from its own checkpoint, such as a vocabulary, is not written into its configuration."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", "runs")
    before = yaml.safe_load(Path("runs/named/config.yaml").read_text())
    words = ["fit", f"--config={trained / 'named.yaml'}", "--model.optimizer.lr", "0.05", "--trainer.max_epochs", "41"]
    assert main([*words, "--ckpt_path", "last"]) == 0
    after = yaml.safe_load(Path("runs/named/config.yaml").read_text())
    assert after.pop("data") == before.pop("data") == {"class_path": "tiny_app.NamedData", "init_args": ANY}
    # In another folder the words are not to be had from the data again.
    words[-1] = "42"
    assert main([*words, "--ckpt_path", "runs/named", "--run_dir", "other"]) == 0
    other = yaml.safe_load(Path("other/config.yaml").read_text())
    assert other["data"]["init_args"]["names"] == {"words": ["east", "north", "south"]}
