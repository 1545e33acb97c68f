"""The log of a run, begun anew and gone on with."""

from __future__ import annotations

from trainings import rows

from apps.train.watch.logs import MetricsCSV


def test_the_log_of_a_new_run_replaces_the_old_one_and_a_resumed_run_continues_it(tmp_path):
    first = MetricsCSV(str(tmp_path))
    for step in range(4):
        first.log_metrics({"a": step}, step)
    first.log_metrics({"b": 9.0}, 3)
    assert [(r["step"], r["a"], r["b"]) for r in rows(tmp_path)][-2:] == [("3", "3.0", ""), ("3", "", "9.0")]
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,1.")  # cut by a kill
    resumed = MetricsCSV(str(tmp_path))
    resumed.continue_from(3)
    resumed.log_metrics({"a": 30.0}, 3)
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "30.0")]
    MetricsCSV(str(tmp_path)).log_metrics({"a": 5.0}, 0)
    assert [r["a"] for r in rows(tmp_path)] == ["5.0"]
