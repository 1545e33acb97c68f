"""``moesaic compare CONFIG --ladder`` as a user calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from compared import CONFIG

from apps.cli import main as moesaic
from apps.compare.ladder.curves import Measured
from apps.compare.ladder.page import Story
from apps.compare.ladder.rungs import Outcome, Rung, RungWork, limits
from apps.compare.options import Options
from apps.compare.training import Unit
from apps.compare.work import Plan
from apps.report.page import html

LADDER = CONFIG.replace("max_epochs: 2", "max_epochs: 10") + (
    "ladder: {model.moe.expert.hidden_dim: linear, learning_rate: -0.5}\n"
)


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    monkeypatch.setattr(html, "script", lambda: "")


def asked(tmp_path, rungs="0.5,1,2", *more):
    (tmp_path / "tiny.yaml").write_text(LADDER)
    fixed = ["--seeds", "2", "--rounds", "0", "--data.n", "128", "--output", str(tmp_path / "out")]
    return ["compare", str(tmp_path / "tiny.yaml"), "--ladder", rungs, *fixed, *more]


def files(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("result.json")}


@pytest.mark.slow
def test_a_ladder_and_one_rung_more(tmp_path, capsys):
    assert moesaic(asked(tmp_path, "0.5,1")) == 0
    out = tmp_path / "out"
    begun, first = json.loads((out / "gates.json").read_text()), files(out)
    # F = 4, 8, 16 take 128 + 4 (64 + 64 F) + 48 FLOPs an example: 1456, 2480, 4528. 80 steps of 16 are the budget.
    assert [rung["steps"] for rung in begun["rungs"]] == [68, 80]
    assert "Sparse against dense, equal FLOPs, rung by rung: " in " ".join(capsys.readouterr().out.split())
    assert moesaic(asked(tmp_path)) == 0
    ladder = json.loads((out / "ladder.json").read_text())
    assert files(out).items() >= first.items(), "finished runs are not done again"
    assert [rung["steps"] for rung in ladder["rungs"]] == [68, 80, 88]
    assert ladder["rungs"][1]["kinds"]["sparse"]["flops"] == 3 * 2480 * 16 * 80
    for rung in ladder["rungs"]:
        sparse, dense = rung["kinds"]["sparse"], rung["kinds"]["dense_equal_flops"]
        assert dense["flops"] == sparse["flops"]
        assert len(sparse["loss"]) == len(dense["loss"]) == 2
        assert len(sparse["blocks"][0]) == len(sparse["shares"]) > 1
        assert np.dot(sparse["blocks"][0], sparse["shares"]) == pytest.approx(sparse["loss"][0], rel=1e-3)
    # The rate is searched on two rungs; the third has the second's over the root of 2.
    rates = [{k: v["learning_rate"] for k, v in rung["kinds"].items()} for rung in ladder["rungs"]]
    assert all(rate in (0.00471, 0.0141, 0.0424) for rate in rates[0].values())
    assert rates[2] == {kind: pytest.approx(rate / 2**0.5, rel=0.01) for kind, rate in rates[1].items()}
    saved = json.loads((out / "gates.json").read_text())
    assert saved["gates"] == begun["gates"]
    assert saved["date"] == begun["date"], "the gates are those of the first run"
    assert len(saved["rungs"]) == 3
    assert (out / "report.html").exists()
    assert (out / "ladder.png").exists()


@pytest.mark.slow  # a killed one is tried by bench soak
def test_a_stopped_ladder_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    from apps.compare import training, work

    done, most, real = [], 5, training.train

    def stopping(*args, **kwargs):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **kwargs)

    monkeypatch.setattr(work, "train", stopping)
    argv = asked(tmp_path, "0.5,1", "--learning_rates", "0.01")
    assert moesaic(argv) == 130
    most = 99
    assert moesaic(argv) == 0
    stopped = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert len(done) == 8, "2 rungs, 2 systems and 2 seeds, each once"
    assert moesaic([*argv, "--output", str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole" / "ladder.json").read_text())
    for one, other in zip(stopped["rungs"], whole["rungs"], strict=True):
        assert all(one["kinds"][k]["loss"] == other["kinds"][k]["loss"] for k in one["kinds"])


def test_gates_do_not_change_and_minutes_end_a_ladder(tmp_path, capsys):
    argv = asked(tmp_path, "0.5,1,2", "--learning_rates", "0.01", "--minutes", "0.001")
    assert moesaic(argv) == 0
    shown = capsys.readouterr()
    assert "rung 1 and above are not begun" in shown.out + shown.err
    ladder = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [rung["rung"] for rung in ladder["rungs"]] == [0.5]
    gates = tmp_path / "out" / "gates.json"
    gates.write_text(gates.read_text().replace("lies below 0", "lies below 1"))
    assert moesaic(argv) == 1
    assert "holds another ladder (gates.gain on a rung" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rungs", "section", "message"),
    [
        ("3", "", "--ladder 3 is one rung"),
        ("1,1", "", "must rise"),
        ("3,1", "", "must rise"),
        ("0,1", "", "must rise"),
        ("1,x", "", "give numbers with commas"),
        ("0.001,1", "", "fewer than 20 are no training"),
        ("1,2", "ladder: null", "has no section ladder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(rungs, section, message, tmp_path, capsys):
    argv = asked(tmp_path, rungs)
    if section:
        (tmp_path / "tiny.yaml").write_text(CONFIG)
    assert moesaic(argv) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_fit_takes_a_configuration_with_a_ladder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(LADDER)
    argv = [
        "fit",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--run_dir",
        str(tmp_path / "run"),
        "--trainer.max_epochs",
        "1",
    ]
    assert moesaic(argv) == 0


def outcome(number, sparse, dense, turned=0.0):
    rung = Rung(number, 0, {}, 100, 800, number * 1e12, ())
    kinds = {
        name: Measured(number * 1e12, seconds, np.array(losses)[:, None], np.ones(1))
        for name, losses, seconds in (("sparse", sparse, 2 * number), ("dense_equal_flops", dense, number))
    }
    return Outcome(rung, kinds, dict.fromkeys(kinds, (0.01, False)), dict.fromkeys(kinds, turned), 1.0)


def test_the_story_of_a_ladder_by_hand():
    # 2 x^-1/2 and 4 x^-1/2, seeds at -1, 0 and +1 %: sparse needs a quarter of the FLOPs and half of the time.
    seeds = np.array([0.99, 1.0, 1.01])
    outcomes = [outcome(x, 2 * seeds * x**-0.5, 4 * seeds * x**-0.5) for x in (1.0, 4.0, 16.0, 64.0)]
    story = Story(outcomes, "loss")
    text = " ".join(story.sentences())
    assert "wins at 1, wins at 4, wins at 16, wins at 64" in text
    assert "x0.25 (0.2" in text
    assert "the training FLOPs: cheaper" in text
    assert "x0.50 (0.4" in text
    assert "the gain shows no change" in text
    assert "cannot tell the floor" in text
    assert [p.expected.value for p in story.tested] == pytest.approx([2 / 8, 4 / 8], rel=1e-3)
    assert all(p.expected.holds(p.came) for p in story.tested)
    assert story.next == 256
    assert [p.expected.value for p in story.ahead] == pytest.approx([2 / 16, 4 / 16], rel=1e-3)


def test_rungs_beyond_the_turn_are_not_fitted():
    seeds = np.array([0.99, 1.0, 1.01])
    outcomes = [outcome(x, 2 * seeds * x**-0.5, 4 * seeds * x**-0.5) for x in (1.0, 4.0, 16.0)]
    outcomes += [
        replace(
            outcomes[-1], rung=replace(outcomes[-1].rung, number=64.0), turned={"sparse": 0.05, "dense_equal_flops": 0}
        )
    ]
    outcomes += [outcome(256.0, 3 * seeds, 1 * seeds)]
    assert limits(outcomes) == [False, False, False, True, True]
    story = Story(outcomes, "loss")
    assert [o.rung.number for o in story.fitted] == [1, 4, 16]
    assert "Limited by data, and not fitted: 2 rungs (64, 256)" in " ".join(story.sentences())


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (0.11, [0.033, 0.1, 0.3], (0.1, False)),
        (0.5, [0.033, 0.1, 0.3, 0.6, 1.2], (0.6, False)),
        (0.02, [0.033, 0.1, 0.3, 0.0165, 0.00825], (0.0165, False)),
        (1e9, [0.033, 0.1, 0.3, 0.6, 1.2, 2.4], (2.4, True)),
    ],
)
def test_a_search_goes_on_beyond_its_edge(best, tried, chosen, tmp_path, monkeypatch):
    plan = Plan({}, Options(), {}, (0.033, 0.1, 0.3), 0.1, (0,), 1000)
    experiment, whole = SimpleNamespace(monitor_mode="min"), SimpleNamespace(grow=lambda share: None)
    work = RungWork({}, experiment, plan, [], tmp_path, whole, 1)
    done = []

    def train(units):
        done.extend(unit.rate for unit in units)
        return {unit: {"quality": abs(np.log(unit.rate / best))} for unit in units}

    monkeypatch.setattr(work, "_train", train)
    system = SimpleNamespace(name="sparse", title="sparse", cost=1)
    searched = train(plan.search_units("sparse"))
    assert work._choose(system, searched) == chosen
    assert done == tried == [unit.rate for unit in searched]
    assert {type(unit) for unit in searched} == {Unit}
