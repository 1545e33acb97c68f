"""The frame of ``moesaic bench soak``, and what it takes for a fault."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import soak
from benchmarks._soak import kills, trees, works
from benchmarks._soak.outcome import Outcome, generator


@pytest.fixture
def parts(monkeypatch):
    """Take the place of two parts: one has a fault in case 1 of three, the other one breaks in its first."""

    def three(numbers, folder):
        for number in numbers:
            if number >= 3:
                return
            (folder / "file").touch()
            yield Outcome(number, f"kind {number % 2}: a case", "wrong" * (number == 1), count=2)

    def broken(numbers, folder):
        yield Outcome(next(numbers), "a tool is missing", count=0)
        raise OSError("no disk")

    for name, cases in {"kills": three, "machine": broken}.items():
        monkeypatch.setitem(sys.modules, f"benchmarks._soak.{name}", SimpleNamespace(cases=cases))


def test_a_campaign_counts_cases_and_faults_and_goes_on(parts, tmp_path, capsys):
    argv = ["--minutes", "1", "--output", str(tmp_path)]
    assert soak.main([*argv, "--parts", "kills"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["first case: kills #0: kind 0: a case", "fault: kills #1: kind 1: a case: wrong"]
    assert [line.split()[:3] for line in lines[2:]] == [["part", "cases", "faults"], ["kills", "6", "1"]]
    saved = json.loads((tmp_path / "soak.json").read_text())["parts"]["kills"]
    assert saved["kinds"] == {"kind 0": 4, "kind 1": 2}
    assert saved["next"] == 4
    assert saved["faults"] == [{"number": 1, "what": "kind 1: a case", "fault": "wrong", "count": 2}]
    assert soak.main([*argv, "--parts", "kills"]) == 1  # the fault stays
    assert json.loads((tmp_path / "state.json").read_text())["kills"]["cases"] == 6


def test_a_part_that_breaks_or_has_no_case_is_a_fault(parts, tmp_path, capsys):
    assert soak.main(["--minutes", "1", "--output", str(tmp_path), "--parts", "machine"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("note: machine: a tool is missing\nfault: machine #0: the part ended: OSError: no disk\n")


def test_one_case_can_be_tried_alone(parts, tmp_path, capsys):
    argv = ["--parts", "kills", "--output", str(tmp_path), "--case"]
    assert soak.main([*argv, "1"]) == 1
    assert soak.main([*argv, "2"]) == 0
    assert capsys.readouterr().out.endswith("kills #2: 2 cases, 0 faults\n")
    assert (tmp_path / "alone" / "file").exists()
    assert not (tmp_path / "state.json").exists()


def test_a_case_follows_from_its_number():
    assert generator("kills", 3).random() == generator("kills", 3).random()
    assert generator("kills", 3).random() != generator("machine", 3).random()


def test_folders_differ_by_weights_and_logs_but_not_by_times(tmp_path):
    for name, weight, seconds in (("a", 1.0, 2), ("b", 1.0, 3), ("c", 1.5, 2)):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.tensor([weight])}, tmp_path / name / "last.ckpt")
        (tmp_path / name / "metrics.csv").write_text(f"step,loss,train/examples_per_second\n1,0.5,{seconds}\n")
        (tmp_path / name / "result.json").write_text(json.dumps({"score": 1, "seconds": seconds}))
    a, b, c = (tmp_path / name for name in "abc")
    assert trees.unlike(a, b) == ""
    assert trees.unlike(a, c) == "last.ckpt differs in ['/w']"
    (b / "metrics.csv").write_text("step,loss\n1,0.25\n")
    assert trees.unlike(a, b).startswith("metrics.csv differs")
    (b / "more.txt").touch()
    assert trees.unlike(a, b) == "lacks [], has ['more.txt'] besides"


@pytest.mark.parametrize("name", ["last.ckpt", "results.json", "report.html", "config.yaml"])
def test_a_cut_file_is_broken_under_its_final_name_only(name, tmp_path):
    whole = {"results.json": b'{"a": 1}', "report.html": b"<html></html>", "config.yaml": b"a: [1, 2]"}
    torch.save({"w": torch.ones(3)}, tmp_path / "last.ckpt")
    content = whole.get(name) or (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / name).write_bytes(content)
    assert trees.broken(tmp_path) == ""
    (tmp_path / f".{name}").write_bytes(content[:-3])
    assert trees.broken(tmp_path) == ""
    (tmp_path / name).write_bytes(content[:-3])
    assert trees.broken(tmp_path).startswith(f"{name} is not whole: ")


def test_a_part_that_takes_longer_takes_from_those_after_it_which_still_try_a_case(tmp_path, monkeypatch, capsys):
    """Of 170 seconds numbers may take 30, 3 of 17 parts, and takes 100 with its set-up. History gets 5 of the rest,
    and takes 65; load gets 1.5 of 5, inputs 1 of 3, kills and machine nothing: each of them tries one case.
    """
    clock, seen = [0.0], []
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def lasts(name, set_up, each):
        def cases(numbers, folder):
            clock[0] += set_up
            for number in numbers:
                clock[0] += each
                seen.append(name)
                yield Outcome(number, "a case")

        return SimpleNamespace(cases=cases)

    for name, (set_up, each) in {"numbers": (95, 5), "history": (0, 65), "load": (1, 1)}.items():
        monkeypatch.setitem(sys.modules, f"benchmarks._soak.{name}", lasts(name, set_up, each))
    for name in ("inputs", "kills", "machine"):
        monkeypatch.setitem(sys.modules, f"benchmarks._soak.{name}", lasts(name, 0, 10))
    assert soak.main(["--minutes", f"{170 / 60}", "--output", str(tmp_path)]) == 0
    assert seen == [*soak.PARTS]
    assert capsys.readouterr().out.count("first case: ") == 6
    for name in soak.PARTS:
        importlib.import_module(f"benchmarks._soak.{name}")


@pytest.mark.slow
def test_a_killed_command_is_repeated_and_leaves_what_an_unbroken_one_does(tmp_path):
    number = [work.name for work in works.WORKS].index("data")
    (outcome,) = kills.cases(iter([number]), tmp_path)
    assert outcome.what.startswith("data: ")
    assert outcome.fault == ""
