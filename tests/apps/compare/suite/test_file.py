"""The suite file: what it says, and what is refused before anything is trained."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from refusals import refused
from small_suite import asked, read, small_suite

from apps.cli import main as moesaic
from apps.cli.configs import at
from apps.compare.suite.file import Suite, slug


def test_rows_are_models_with_their_baselines_and_then_those_of_the_board(tmp_path):
    models = [
        {"name": "A", "baselines": ["dense_equal_flops"], "minutes": 3},
        {"name": "B", "overlays": ["configs/debug.yaml"], "values": {"model.moe.num_experts": 8}},
    ]
    (board,) = Suite.read(small_suite(tmp_path, models=models, minutes=2, baselines=["centroids"])).boards
    own, of_own, wide, of_board = board.entries
    assert [e.name for e in board.entries] == ["A", "A: dense_equal_flops", "B", "centroids"]
    assert [e.baseline for e in board.entries] == [None, "dense_equal_flops", None, "centroids"]
    assert [e.minutes for e in board.entries] == [3, 3, 2, 2]
    assert wide.files == (str(tmp_path / "tiny.yaml"), "configs/debug.yaml")
    # The board's values are under the model's; a list is written as the command line has it.
    assert wide.rest[-2:] == ("--model.moe.num_experts", "8")
    assert shlex.join(own.rest).startswith('--trainer.max_epochs 1 --model.offers \'["dense_equal_flops"')
    assert at(wide.written, ("model", "moe", "num_experts")) == 8
    assert (at(of_own.written, ("model", "moe", "num_experts")), of_board.written) == (4, own.written)


def test_folders_depend_on_what_is_trained_and_seeds_count_up(tmp_path):
    def folder(**values):
        path = small_suite(tmp_path, models=[{"name": "A", "values": values}])
        return Suite.read(path).boards[0].entries[0].folder(tmp_path)

    first = folder()
    assert (first.parent, folder(**{"data.root": "elsewhere", "data.num_workers": 2})) == (tmp_path / "points", first)
    assert folder(**{"data.batch_size": 8}) != first
    path = small_suite(tmp_path, models=[{"name": "A"}, {"name": "B", "values": {"seed_everything": 7}}])
    suite = Suite.read(path)
    assert [suite.seeds_of(entry) for entry in suite.boards[0].entries[:2]] == [(0, 1), (7, 8)]


def test_a_board_of_data_has_what_init_writes_and_a_split_for_each_seed(tmp_path):
    table = tmp_path / "shop.csv"
    table.write_text("\n".join(["age,bought", *(f"{20 + i % 50}.5,{i % 3 % 2}" for i in range(300))]))
    options = {"config": "", "values": {}, "baselines": [], "data": str(table), "target": ["bought"]}
    models = [{"name": "sparse"}, {"name": "wide", "values": {"model.shared.num_experts": 16}}]
    suite = Suite.read(small_suite(tmp_path, seeds=3, models=models, metrics=[], **options))
    first, wide = suite.boards[0].entries
    assert first.files == (str(tmp_path / "runs" / "configs" / "points.yaml"),)
    written = yaml.safe_load(Path(first.files[0]).read_text())
    assert at(written, ("data", "init_args", "train_file")) == str(table)
    assert at(written, ("data", "init_args", "table", "split", "origins")) == 3
    assert [at(e.written, ("model", "shared", "num_experts")) for e in (first, wide)] == [8, 16]
    Path(first.files[0]).write_text(yaml.safe_dump(written | {"seed_everything": 5}))  # a person's change is kept
    assert suite.seeds_of(Suite.read(tmp_path / "suite.yaml").boards[0].entries[0]) == (5, 6, 7)


def test_places_are_those_of_the_command_line_or_a_folder_of_runs(tmp_path):
    words = ["--minutes", "3", "--output", str(tmp_path / "r"), "--figures", "f", "--boards", "Points"]
    command = read(small_suite(tmp_path), *words)
    assert (command.minutes, command.rounds, command.suite.runs) == (3.0, 0, str(tmp_path / "r"))
    assert (command.suite.figures, command.suite.chosen) == ("f", ("Points",))
    path = small_suite(tmp_path)
    suite = yaml.safe_load(path.read_text())
    for name in ("runs", "figures", "leaderboard"):
        del suite[name]
    path.write_text(yaml.safe_dump(suite))
    made = Suite.read(path)
    assert made.runs_folder.as_posix() == "runs/suites/suite"
    assert made.figures_folder.as_posix() == "runs/suites/suite/figures"
    assert made.leaderboard_file.as_posix() == "runs/suites/suite/leaderboard.md"


A, B = {"name": "A"}, {"name": "B"}

WRONG = {
    "unknown key of a board": ({"modles": []}, "boards.0: key of a board='modles' is not one of name, models, config,"),
    "unknown key of a model": ({"models": [{"name": "A", "epochs": 3}]}, "boards.0.models.0: key of a model='epochs'"),
    "no name": ({"models": [{"config": "x"}]}, "boards.0.models.0: a model needs 'name'"),
    "no models": ({"models": []}, "boards.0: the board 'Points' has no models"),
    "a model that is a text": ({"models": ["A"]}, "boards.0.models.0='A' is not a model: a mapping of its keys"),
    "models by name": ({"models": {"A": {}}}, "boards.0.models={'A': {}} is not a list"),
    "a number in place of a text": ({"about": 3}, "boards.0.about=3 is not a text"),
    "two of one name": ({"models": [A, A]}, "boards.0: two rows of the board 'Points' are called 'A'"),
    "two of one baseline": ({"models": [A], "baselines": ["x", "x"]}, "two rows of the board 'Points' are called 'x'"),
    "minutes": ({"models": [{"name": "A", "minutes": 0}]}, "boards.0.models.0: minutes=0 must be above 0"),
    "config and data": ({"data": "x.csv"}, "boards.0: the board 'Points' has a config and data: leave out one"),
    "neither": ({"config": ""}, "boards.0: the board 'Points' has neither config nor data"),
    "no file": ({"config": "", "data": "x.csv"}, "the board 'Points': no file or folder x.csv"),
    "missing config": ({"models": [A, {**B, "config": "nowhere.yaml"}]}, "no configuration nowhere.yaml"),
    "other data": (
        {"models": [A, {**B, "values": {"data.n": 48}}]},
        "board 'Points': 'B' has data.n=48, and 'A' has None: the rows of a board share data, split and test examples",
    ),
    "another protocol": (
        {"models": [A, {**B, "values": {"model.keeps_examples": True}}], "must_agree": ["model.keeps_examples"]},
        "'B' has model.keeps_examples=True, and 'A' has None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("board, line", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_by_one_line(tmp_path, board, line, capsys):
    path = small_suite(tmp_path, **board)
    assert moesaic(asked(path)) in (1, 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {path}: ")
    assert line in said
    assert not (tmp_path / "runs").exists()


def test_what_may_differ_is_not_refused_and_names_are_parts_of_paths(tmp_path, capsys):
    models = [A, {**B, "values": {"data.n": 48, "data.batch_size": 8}}]
    assert len(Suite.read(small_suite(tmp_path, models=models, may_differ=["data.n"])).boards[0].models) == 2
    assert [slug("MMoE, 4 of 64 (top-k)"), slug("§")] == ["mmoe_4_of_64_top_k", "unnamed"]
    assert moesaic(["compare", "--suite=configs/suites/recomenders.yaml"]) == 2
    assert "did you mean configs/suites/recommenders.yaml?" in capsys.readouterr().err


@pytest.mark.parametrize("change, line", [
    ({"sedes": 3}, "key of a suite='sedes' is not one of title, boards, about, seeds"),
    ({"path": "x"}, "key of a suite='path' is not one of"),
    ({"boards": []}, "a suite needs at least one board"),
    ({"boards": [{"name": "points", "config": "x", "models": [{"name": "A"}]}] * 2}, "two boards are called 'points'"),
    ({"seeds": 0}, "seeds=0 must be at least 1"),
    ({"seeds": True}, "seeds=True is not an integer"),
    ({"title": None}, "title=None is not a text"),
])  # fmt: skip
def test_a_wrong_suite_is_refused(tmp_path, change, line):
    path = small_suite(tmp_path)
    changed = yaml.safe_dump({**yaml.safe_load(path.read_text()), **change})
    path.write_text(changed.replace("config: x", f"config: {tmp_path}/tiny.yaml"))
    refused(rf"suite\.yaml: .*{re.escape(line)}", Suite.read, path)


@pytest.mark.parametrize("words, line", [
    (["--boards", "Pints"], "boards='Pints' is not one of Points"),
    (["--minutes", "-1"], "--minutes -1 must not be negative"),
    (["--minutes", "nan"], "--minutes nan must not be negative"),
    (["--seeds", "3"], "seeds does not exist"),
    (["--figures", "{folder}/suite.yaml"], "suite.yaml is a file, not a folder"),
])  # fmt: skip
def test_wrong_options_are_refused(tmp_path, words, line, capsys):
    path = small_suite(tmp_path)
    assert moesaic(asked(path, *(word.replace("{folder}", str(tmp_path)) for word in words))) == 2
    assert line in capsys.readouterr().err
