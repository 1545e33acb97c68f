"""``moesaic bench``."""

from __future__ import annotations

import dataclasses
import json

from apps import bench
from apps.base.machine import machine_facts
from apps.cli import main as moesaic

_SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Row:
    x: int

def main(argv):
    print("ran", argv)
"""


def test_bench_runs_the_file_with_its_options(tmp_path, monkeypatch, capsys):
    (tmp_path / "layer.py").write_text(_SCRIPT)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert moesaic(["bench", "layer", "--rounds", "1"]) == 0
    assert capsys.readouterr().out == "ran ['--rounds', '1']\n"
    (tmp_path / "_parts.py").write_text("")  # no benchmark: others take their parts from it
    assert moesaic(["bench", "larye"]) == 2
    assert "'larye' is no benchmark; there is layer" in capsys.readouterr().err
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "none")
    assert moesaic(["bench", "layer"]) == 2
    assert "they are in the source tree" in capsys.readouterr().err


def test_bench_routing_reads_the_overlays(capsys):
    assert (
        moesaic(["bench", "routing", "--small", "--rounds", "2", "--threads", "1", "--routers", "switch", "top2"]) == 0
    )
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines] == ["router", "plain top-1", "plain top-2", "switch", "top2"]
    # The same router under two names: the same balance and the same drops.
    assert lines[1][5:] == lines[3][5:]
    assert lines[2][5:] == lines[4][5:]
    assert 1 < float(lines[2][5]) < float(lines[2][6]) <= 16


def test_bench_routing_names_an_unknown_router(capsys):
    assert moesaic(["bench", "routing", "--routers", "swich"]) == 2
    assert "router 'swich' is neither a file nor one of" in capsys.readouterr().err


def test_systems_take_turns_and_the_first_round_warms_up():
    rounds, calls = bench.load("_rounds"), []

    def loop(name, seconds):
        return lambda: calls.append(name) or seconds[calls.count(name) - 1]

    seconds = rounds.in_turn({"ours": loop("ours", [9.0, 2.0, 1.0]), "theirs": loop("theirs", [9.0, 4.0, 4.0])}, 2)
    assert seconds == {"ours": [2.0, 1.0], "theirs": [4.0, 4.0]}
    assert calls == ["ours", "theirs"] * 3
    (ours, theirs) = rounds.rates(seconds, 12.0, "theirs")
    # 6 and 12 a second: the quartiles of two values lie a quarter of their distance beyond them.
    assert ours == ("ours", [4.5, 9.0, 13.5], 3.0)  # twice and four times as fast
    assert theirs == ("theirs", [3.0, 3.0, 3.0], 1.0)
    assert list(rounds.rates({"ours": [2.0]}, 12.0, "theirs")) == [("ours", [6.0, 6.0, 6.0], None)]


def test_rows_are_written_with_the_machine_and_what_the_benchmark_says(tmp_path):
    write_rows, row = (
        bench.load("_rounds").write_rows,
        dataclasses.make_dataclass("Row", ["system", "ms"])("eager", 1.5),
    )
    write_rows(None, [row], {})
    write_rows(tmp_path / "new" / "rows.json", [row], {"threads": 1}, texts=3)
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert written.pop("machine") == {**machine_facts(), "threads": 1}
    assert written == {"texts": 3, "rows": [{"system": "eager", "ms": 1.5}]}
