"""Test windows of a split by time, which the seeds of a comparison take in turn."""

from __future__ import annotations

import pytest

from apps.compare.experiment import Experiment, arguments
from apps.compare.systems import SPARSE

CONFIG = """
model: {class_path: MultiTaskRecommender}
data:
  class_path: TableData
  init_args:
    dataset: table
    train_file: rows.csv
    table:
      continuous: [x]
      tasks: {y: {column: y}}
      time: at
      split: {kind: time, val: 0.25, test: 0.1, origins: 3}
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i},{i % 7},{i % 2}\n" for i in range(80))
    (tmp_path / "rows.csv").write_text("at,x,y\n" + rows)
    (tmp_path / "table.yaml").write_text(CONFIG)
    return lambda *words: Experiment(arguments("table.yaml", [], ["--seed_everything", "5", *words]))


def sizes(data):
    return tuple(data.sizes().values())


def test_each_seed_tests_the_next_window(experiment):
    # Of 80 rows the windows are 56-63, 64-71 and 72-79; a quarter of the rows before validate.
    made = experiment()
    windows = [(42, 14, 8), (48, 16, 8), (54, 18, 8)]
    assert [sizes(made.build(SPARSE, seed=seed)[1]) for seed in (5, 6, 7, 8)] == [*windows, windows[0]]
    assert made.num_windows == 3
    assert sizes(made.data()) == windows[0]  # that of the first seed, whose model is measured
    assert sizes(made.build(SPARSE)[1]) == windows[2]  # as a fit has it


def test_a_window_that_is_named_is_that_of_every_seed(experiment):
    made = experiment("--data.table.split.origin", "1")
    assert made.num_windows == 1
    assert [sizes(made.build(SPARSE, seed=seed)[1]) for seed in (5, 6)] == [(48, 16, 8)] * 2
