"""``moesaic compare --suite`` as a user calls it: what is finished is not done again, and what is not goes on."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from compared import CONFIG
from filelock import FileLock
from small_suite import asked, read, small_suite

from apps.cli import main as moesaic
from apps.compare import training
from apps.compare.experiment import Experiment
from apps.compare.suite import command
from apps.report.page import html


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Suites with the same configurations share their experiments: reading them takes as long as training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "experiment_of", functools.cache(command.experiment_of))
        patch.setattr(Experiment, "plain", functools.cache(Experiment.plain))
        yield


@pytest.fixture(scope="module")
def suite_in(tmp_path_factory) -> Callable[..., Path]:
    """The function ``small_suite``, whose configuration is one file for all tests."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(CONFIG)
    return functools.partial(small_suite, config=str(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, suite_in) -> Path:
    """The folder of a finished suite; only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "script", lambda: "")
        assert moesaic(asked(suite_in(folder))) == 0
    return folder


@pytest.fixture
def finished(whole, tmp_path, suite_in) -> Path:
    """A copy of ``whole`` to go on in: the path of its suite file."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return suite_in(tmp_path)


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, int]]:
    """The system and the seed of each training from now on."""
    trained: list[tuple[str, int]] = []

    def train(*args, **kwargs):
        trained.append((args[1].system, args[1].seed))
        return training.train(*args, **kwargs)

    monkeypatch.setattr(command, "train", train)
    return trained


def rows(folder: Path) -> dict:
    return json.loads((folder / "figures" / "points.json").read_text())["rows"]


def measured_by(folder: Path) -> dict:
    return {name: {seed: run["test"] for seed, run in row["runs"].items()} for name, row in rows(folder).items()}


def test_a_suite_that_is_stopped_goes_on_and_trains_each_run_once(whole, tmp_path, monkeypatch, done, capsys, suite_in):
    path, real = suite_in(tmp_path), training.Curve.on_train_batch_end

    def interrupted(self, trainer, *args):
        real(self, trainer, *args)
        if len(done) == 2 and trainer.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Curve, "on_train_batch_end", interrupted)
        assert moesaic(asked(path)) == 130
    assert f"To continue: moesaic compare --suite {path}" in capsys.readouterr().err
    assert list(measured_by(tmp_path)["two of four"]) == ["0"]
    assert "Not run: all four; centroids." in (tmp_path / "board.md").read_text()
    assert moesaic(asked(path)) == 0
    second = ("sparse", 0)  # was begun twice
    assert done == [("sparse", 0), second, second, ("centroids", 0), ("sparse", 1), ("sparse", 1), ("centroids", 1)]
    assert measured_by(tmp_path) == measured_by(whole)
    moved = (tmp_path / "board.md").read_text().replace(str(tmp_path), str(whole))
    assert moved.splitlines()[:8] == (whole / "board.md").read_text().splitlines()[:8]


def test_figures_or_finished_folders_alone_are_enough(finished, done):
    expected = measured_by(finished.parent)
    (finished.parent / "figures" / "points.json").unlink()  # killed between the two
    assert (moesaic(asked(finished)), done, measured_by(finished.parent)) == (0, [], expected)
    before = (finished.parent / "board.md").read_text().partition("## How to repeat")[0]
    shutil.rmtree(finished.parent / "runs")
    assert (moesaic(asked(finished)), done) == (0, [])
    assert (finished.parent / "board.md").read_text().partition("## How to repeat")[0] == before
    assert sum(path.stat().st_size for path in (finished.parent / "figures").iterdir()) < 20_000


def test_the_minutes_end_a_run_with_a_checkpoint_from_which_it_goes_on(whole, tmp_path, done, suite_in):
    path, steps = suite_in(tmp_path, seeds=1), []
    real = command._StopsInTime.on_train_batch_end

    def step(self, trainer, *args):
        steps.append(trainer.global_step)
        real(self, trainer, *args)

    def run(minutes):
        """Run for so long by a clock that goes on by a second a step, as far as the queue can see."""
        return command.run_suite(read(path, "--minutes", minutes), "again", lambda: float(len(steps)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command._StopsInTime, "on_train_batch_end", step)
        assert run("0.15").is_over  # 9 s: the third step of the second run
        assert (steps, list(rows(tmp_path)["two of four"]["runs"])) == ([*range(1, 7), 1, 2, 3], ["0"])
        assert rows(tmp_path)["all four"]["runs"] == {}
        steps.clear()
        run("0.04")  # 2.4 s: its last step, whose epoch is ended
        assert steps == [4, 5, 6]
    command.run_suite(read(path), "again")
    assert done.count(("sparse", 0)) == 4
    assert measured_by(tmp_path)["all four"]["0"] == measured_by(whole)["all four"]["0"]


def test_no_minutes_write_the_leaderboard_alone(tmp_path, done, capsys, suite_in):
    path = suite_in(tmp_path, minutes=30)
    assert (moesaic(asked(path, "--minutes", "0")), done) == (0, [])
    page = (tmp_path / "board.md").read_text()
    again = f"moesaic compare --suite {path} --boards Points (about 4.0 h)"  # 4 rows, 2 seeds of 30 minutes
    assert f"Not run. {again}" in page
    assert "| two of four | – | not run | – |" in page
    said = " ".join(capsys.readouterr().out.split())
    assert "the time is up; runs left: 8, about 4.0 h by the suite's estimates. To continue: moesaic compare" in said
    assert "--minutes 0" not in said
    assert "Nothing has been run yet." in said


def test_another_configuration_is_trained_anew_and_says_so(finished, done, capsys, suite_in):
    values = {"trainer.max_epochs": 1, "model.offers": ["dense_equal_flops"], "model.optimizer.lr": 0.02}
    suite_in(finished.parent, models=[{"name": "two of four", "values": values}], baselines=[])
    assert moesaic(asked(finished)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Points: two of four: its configuration has changed" in said
    assert "lr: 0.01 saved, 0.02 now" in said
    assert done == [("sparse", 0), ("sparse", 1)]
    suite_in(finished.parent, models=[{"name": "two of four"}], baselines=[])
    assert moesaic(asked(finished)) == 0
    assert done == [("sparse", 0), ("sparse", 1)]  # the first one's folder is still there


def test_data_that_cannot_be_had_leave_out_their_board_alone(tmp_path, done, capsys, suite_in):
    path = suite_in(tmp_path, seeds=1, models=[{"name": "two of four"}], baselines=[])
    board = {"name": "Elsewhere", "config": str(tmp_path / "tiny.yaml"), "models": [{"name": "its model"}]}
    board["values"] = {"data": "compare_app.MissingData"}
    suite = yaml.safe_load(path.read_text())
    suite["boards"].insert(0, board)
    path.write_text(json.dumps(suite))
    assert (moesaic(asked(path)), done) == (0, [("sparse", 0)])
    said = " ".join(capsys.readouterr().out.split())
    assert "Elsewhere is not run: the points cannot be fetched" in said
    assert "the data of some boards cannot be had; runs left: 1" in said
    assert "| its model | – | not run | – |" in (tmp_path / "board.md").read_text()


def test_a_training_that_diverges_is_a_result_and_the_others_go_on(tmp_path, done, suite_in):
    models = [{"name": "wild", "values": {"model.explodes_from": 0.001}}, {"name": "two of four"}]
    path = suite_in(tmp_path, seeds=1, models=models, baselines=[])
    for _ in range(2):
        assert moesaic(asked(path)) == 0
    assert done == [("sparse", 0)] * 2
    page = (tmp_path / "board.md").read_text()
    assert "| wild | sparse | diverged | – |" in page
    assert "\nwild: diverged with 1 of 1 seeds." in page


@pytest.mark.parametrize("kept", [True, False], ids=["trained", "drawn"])
def test_the_speed_is_measured_once_a_row_with_the_first_seeds_weights(kept, finished, done, monkeypatch):
    asked_for = []
    if not kept:
        shutil.rmtree(finished.parent / "runs" / "points")

    def measured(jobs, rounds, *_):
        asked_for.extend(job.checkpoint and Path(job.checkpoint).parent.name for job in jobs.values())
        rates = {"train_examples_per_second": 321.0, "inference_examples_per_second": 654.0}
        return {name: {**rates, "peak_memory_bytes": 3 * 2**20, "base_memory_bytes": 2**20} for name in jobs}

    monkeypatch.setattr(command, "measure", measured)
    for _ in range(2):
        assert moesaic([*asked(finished)[:-2], "--rounds", "1"]) == 0
    assert done == []
    assert asked_for == ["final-lr0.01-seed0" if kept else None] * 2  # centroids are no network
    assert [row["speed"]["trained"] for row in rows(finished.parent).values() if "speed" in row] == [kept] * 2
    page = (finished.parent / "runs" / "report.html").read_text()
    assert [page.count(f">{figure}<") for figure in (321, 654)] == [2, 2]


def test_rows_of_a_board_have_as_many_test_examples(tmp_path, monkeypatch, capsys, suite_in):
    path, numbers = suite_in(tmp_path), iter([48, 47])
    real = command._facts
    monkeypatch.setattr(command, "_facts", lambda *a: {**real(*a), "test_examples": next(numbers)})
    assert moesaic(asked(path)) == 1
    assert "'all four' has 47 test examples, and 'two of four' has 48: the rows of a board" in capsys.readouterr().err


@pytest.mark.parametrize("board, line", [
    ({"metrics": ["top1", "top3"]}, "board 'Points': 'two of four' tests no 'top3'; it has"),
    ({"baselines": ["forest"]}, "Points: forest: baseline 'forest' is unknown: the module has dense_equal_flops"),
    ({"values": {"model.wide": 3}}, "model.wide"),
], ids=["metric", "baseline", "option"])  # fmt: skip
def test_what_only_the_model_knows_is_refused_by_one_line(tmp_path, board, line, capsys, suite_in):
    assert moesaic(asked(suite_in(tmp_path, **board))) in (1, 2)
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert line in said


@pytest.mark.parametrize("broken, content, line", [
    ("figures/points.json", '{"rows": ', "points.json is not a JSON file"),
    ("figures/points.json", '{"rows": {"two of four": 3}}', "points.json holds no figures of a suite: delete it"),
    ("runs/points/*/units/sparse/final-lr0.01-seed0/result.json", "{", "result.json is not a JSON file"),
])  # fmt: skip
def test_a_file_that_is_no_json_is_named(finished, broken, content, line, capsys):
    (path, *_) = finished.parent.glob(broken)
    if path.name == "result.json":
        (finished.parent / "figures" / "points.json").unlink()
    path.write_text(content)
    assert moesaic(asked(finished)) == 1
    assert line in capsys.readouterr().err


def test_another_process_is_refused_and_more_seeds_train_those_alone(finished, capsys, done):
    with FileLock(finished.parent / "runs" / ".lock"):
        assert moesaic(asked(finished)) == 1
    assert "another suite is at work in" in capsys.readouterr().err
    finished.write_text(finished.read_text().replace("seeds: 2", "seeds: 3"))
    assert (moesaic(asked(finished)), done) == (0, [("sparse", 2), ("sparse", 2), ("centroids", 2)])
    assert "| 3 of 3 |" in (finished.parent / "board.md").read_text()


def test_a_half_written_folder_goes_on(finished, done):
    """A kill leaves a plan without units, and a temporary file beside a checkpoint."""
    expected = measured_by(finished.parent)["two of four"]["0"]
    (finished.parent / "figures" / "points.json").unlink()
    (unit,) = (finished.parent / "runs").glob("points/two_of_four-*/units/sparse/final-lr0.01-seed0")
    shutil.rmtree(unit)
    unit.mkdir()
    (unit / ".last.ckpt.tmp").write_bytes(b"half")
    assert (moesaic(asked(finished)), done) == (0, [("sparse", 0)])
    assert measured_by(finished.parent)["two of four"]["0"] == expected
