"""``moesaic verdict`` as a user calls it: a whole verdict of a tiny model, and one line for each wrong input."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from compared import CONFIG
from own_net import CONFIG as OWN, SPARSIFY
from PIL import Image

import core
from apps.cli import main as moesaic
from apps.recsys.encoding.features import CategoricalFeature, Features
from apps.recsys.tables.module import MultiTaskRecommender
from apps.verdict import command, schedule, training, work
from apps.verdict.command import give_verdict
from apps.verdict.options import VerdictOptions
from apps.verdict.result import lines


class Ticks:
    """A clock that goes on by a hundredth of a second each time it is asked: no machine is slow by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


@pytest.fixture(autouse=True)
def _two_seeds(monkeypatch):
    monkeypatch.setattr(schedule, "SEEDS", (2,))
    monkeypatch.setattr(schedule, "MOST_SEEDS", 2)
    monkeypatch.setattr(work, "MOST_SEEDS", 2)
    monkeypatch.setattr(command, "FACTORS", (1.0, 3.0))
    monkeypatch.setattr(training, "_TRIAL_STEPS", 4)


def asked(tmp_path: Path, config: str, **options) -> VerdictOptions:
    path = tmp_path / "tiny.yaml"
    path.write_text(config)
    return VerdictOptions((path,), tmp_path / "out", **{"minutes": 2.0, "seed": 3, **options})


def test_a_whole_verdict_and_the_same_again(tmp_path, monkeypatch):
    options = asked(tmp_path, CONFIG)
    verdict = give_verdict(options, "moesaic verdict tiny.yaml", clock=Ticks())
    # Two epochs of 96 / 16 = 6 steps; one rung of 2 rates, a quarter of the steps each.
    names = sorted(path.parent.relative_to(tmp_path / "out" / "runs") for path in tmp_path.rglob("result.json"))
    dense = [name.name for name in names if name.parts[0] == "dense_equal_flops"]
    assert [name.partition("-lr")[0] for name in dense] == ["final", "final", "search", "search"]
    assert {name.rpartition("-")[2] for name in dense} == {"seed3", "seed4", "seed1003"}
    assert all("12steps" in name for name in dense if name.startswith("final"))
    assert all("-3steps" in name for name in dense if name.startswith("search"))
    assert verdict.seeds == (3, 4)
    for answer in verdict.answers:
        assert answer.gain.count == 2
        assert answer.gain.num_examples == 2  # the two test batches are what stands for examples here
    numbers = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert (numbers["quality"], numbers["systems"]["sparse"]["steps"]) == ("top1", 12)
    assert numbers["last_line"] == verdict.last_line
    assert numbers["facts"]["spent_seconds"] <= 120
    page = (tmp_path / "out" / "verdict.md").read_text()
    for part in (f"**{verdict.last_line}**", "| dense, equal FLOPs |", "Fewer than 3 seeds decide nothing."):
        assert part in page
    assert verdict.last_line == "verdict: undecided (equal FLOPs); undecided (equal time)"
    report = (tmp_path / "out" / "report.html").read_text()
    assert verdict.last_line in report
    assert "Quality of each seed" in report

    monkeypatch.setattr(work, "do", lambda *_: pytest.fail("trained again"))
    again = give_verdict(options, "moesaic verdict tiny.yaml", clock=Ticks())
    assert (again.answers, again.systems) == (verdict.answers, verdict.systems)
    assert again.facts["spent_seconds"] == verdict.facts["spent_seconds"]
    with pytest.raises(ValueError, match=r"holds another verdict \(minutes: 2\.0 saved, 9\.0 now\): give another"):
        give_verdict(asked(tmp_path, CONFIG, minutes=9.0), "", clock=Ticks())


def test_rows_are_split_by_time_and_counted_by_user(tmp_path):
    path = tmp_path / "visits.csv"
    path.write_text(
        "day,user,x,y\n" + "".join(f"{i},u{i % 10},{(i * 7) % 13},{(i * 7) % 13 > i % 7}\n" for i in range(200))
    )
    options = VerdictOptions((path,), tmp_path / "out", target=("y",), time="day", user="user")
    written, _, _ = command.configuration(options)
    experiment = command.Experiment(command.arguments(written, [], ()))
    _, data = experiment.build("sparse")
    rows = data.rows("test")[:]
    assert rows.index_B.tolist() == [*range(150, 200)]  # the last quarter
    assert len(set(rows.group_B.tolist())) == 10


@pytest.mark.slow
def test_a_second_label_among_the_columns_is_left_out_and_named_before_the_training_and_in_the_end(tmp_path, capsys):
    rng = np.random.default_rng(0)
    bought = rng.integers(0, 2, 240)
    spent = np.where(bought, rng.exponential(30, 240).round(2) + 1, 0.0)
    spent[np.argmax(bought)] = 0.0  # one order was free
    path = tmp_path / "shop.csv"
    rows = zip(rng.normal(size=240), rng.permutation([*range(120)] * 2), spent, bought, strict=True)
    path.write_text("age,plate,spend,bought\n" + "".join(f"{a:.3f},p{p},{s},{b}\n" for a, p, s, b in rows))
    options = VerdictOptions((path,), tmp_path / "out", target=("bought",), minutes=0.4)
    verdict, said = give_verdict(options, "", clock=Ticks()), capsys.readouterr().out
    assert "columns: plate (categorical); age (continuous)" in said
    leak = "check: spend is left out: a leak? It alone predicts bought with AUC 1.0000"
    plate = "check: column 'plate': 33.3% of the val and 41.7% of the test values are not in training"
    assert said.count("check: spend") == said.count("check: column 'plate'") == 1
    assert said.index(leak) < said.index(plate) < said.index("search")
    *_, left_out, found, advice, last = lines(verdict)
    assert left_out.startswith(leak)
    assert (found, advice, last) == (plate, "check: --exclude COLUMN leaves a column out.", verdict.last_line)
    assert (tmp_path / "out" / "verdict.md").read_text().count("spend is left out") == 1
    assert "spend is left out" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "data").exists()  # the table is read where it is


def test_a_module_of_the_user_s_own(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FACTORS", (1.0,))
    verdict = give_verdict(asked(tmp_path, OWN.replace("Points", "Stored") + SPARSIFY), "", clock=Ticks())
    assert (verdict.quality, verdict.systems["dense, equal FLOPs"]["steps"]) == ("test_acc", 6)
    assert 0 <= verdict.systems["sparse"]["train_quality"] <= 1


STREAMED = OWN.replace("own_net.Points", "own_net.Streamed, init_args: {endless: true}") + SPARSIFY


def test_streams_need_no_length(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FACTORS", (1.0,))
    verdict = give_verdict(asked(tmp_path, STREAMED.replace("max_epochs", "max_steps")), "", clock=Ticks())
    assert verdict.systems["dense, equal FLOPs"]["steps"] == 2
    assert verdict.answers[0].gain.num_examples == 3  # each test batch of 16 points is a block
    assert not any("Each evaluation takes the first" in note for note in verdict.notes)


def test_epochs_of_a_stream_tell_no_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"^trainer\.max_epochs=2: the training data have no length.*max_steps$"):
        give_verdict(asked(tmp_path, STREAMED), "", clock=Ticks())


def test_a_budget_that_fits_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FACTORS", (1.0,))
    # A hundredth of a second a look at the clock: the first runs alone take more than 0.3 s.
    with pytest.raises(ValueError, match=r"minutes=0\.02 fits no comparison: 2 seeds of 12 steps.*about") as error:
        give_verdict(asked(tmp_path, CONFIG, minutes=0.02), "", clock=Ticks())
    minutes = float(str(error.value).partition("about ")[2].split()[0])
    assert give_verdict(asked(tmp_path, CONFIG, minutes=minutes), "", clock=Ticks()).seeds == (3, 4)


@pytest.mark.parametrize("words, message", [
    (["empty"], "empty is a folder with neither images nor tables: give a folder of images, one with a table of"),
    (["nowhere.csv"], "no file or folder nowhere.csv"),
    (["note.txt"], "note.txt is no table"),
    (["note.txt", "t.csv"], "note.txt and t.csv have 1 and 61 lines"),
    (["t.csv"], "t.csv is a table and needs --target, the column to predict: a, b, same"),
    (["t.csv", "--target", "c"], "--target 'c' is not a column of t.csv"),
    (["t.csv", "--target", "same"], "--target 'same' is 7 in every row that has one: there is nothing to learn"),
    (["t.csv", "--target", "b", "--minutes", "0"], "minutes=0 must be above 0"),
    (["t.csv", "--target", "b", "--minute", "3"], "minute does not exist; did you mean 'minutes'?"),
    (["t.csv", "--target", "b", "--output", "note.txt"], "note.txt is a file, not a folder"),
    (["t.csv", "--target", "b", "--output", "photos"], "photos holds cat and no verdict: give another --output"),
    (["t.csv", "--target", "b", "--output", "half"], "half holds another verdict"),
    (["t.csv", "--target", "b", "--exclude", "a", "c"], "--exclude 'c' is not a column of t.csv"),
    (["photos", "--user", "a"], "--user a names a column of a table: name its target with --target"),
    (["photos"], "photos holds images in 1 folders of classes"),
    (["a", "b", "c"], "DATA is one path, or two text files: got 3"),
    (["tiny.yaml", "--target", "b"], "--target b: tiny.yaml is a configuration, which names its targets"),
    (["dense.yaml"], "has no MoE layer"),
])  # fmt: skip
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "half", "photos/cat"):
        Path(folder).mkdir(parents=True)
    Path("note.txt").write_text("one line\n")
    Path("half/plan.json").write_text("{}")
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(f"photos/cat/{i}.png")
    Path("tiny.yaml").write_text(CONFIG)
    dense = CONFIG.partition("    moe:")[0] + "    hidden: 8\n"
    Path("dense.yaml").write_text(f"{dense}data: {{class_path: compare_app.TinyData}}\n")
    Path("t.csv").write_text("a,b,same\n" + "".join(f"{i},{i % 2},7\n" for i in range(60)))
    assert moesaic(["verdict", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_towers_of_tasks_are_no_experts():
    tasks = tuple(f"task {i}" for i in range(5))
    columns = Features((CategoricalFeature("city", 5),), tasks=tasks, positives=(0.5,) * 5)
    module = MultiTaskRecommender(columns, core.MMoE(num_experts=4, expert=core.MLP((8,))))
    assert command._num_experts(SimpleNamespace(module=module)) == 4
