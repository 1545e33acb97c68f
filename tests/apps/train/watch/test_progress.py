"""The lines, bars and log that say how far a training or an evaluation is."""

from __future__ import annotations

import io
import re

from rich.console import Console
from tiny_app import TinyModule
from trainings import MOE, TinyData, fit, rows

from apps.base.progress import Bar, bar
from apps.train.watch import progress
from apps.train.watch.logs import MetricsCSV
from apps.train.watch.progress import EpochLines, LogLines, PassBar, last_step


def test_the_progress_says_what_was_reached_and_the_last_step_is_of_the_epochs_or_the_steps(tmp_path, capsys):
    made = fit(TinyModule(3), tmp_path, EpochLines(), max_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    for value in ("train/loss", "val/loss", "val/top1"):
        assert f"  {value} " in lines[0]
    assert re.search(r" s; ends \d\d:\d\d", lines[0])
    assert "ends" not in lines[1]
    assert last_step(made) == made.global_step
    assert last_step(fit(TinyModule(3), tmp_path / "steps", max_epochs=2, max_steps=3)) == 3


def test_a_log_has_a_line_a_minute(tmp_path, capsys, monkeypatch):
    fit(TinyModule(3), tmp_path, LogLines(), max_epochs=1)
    assert len(capsys.readouterr().out.splitlines()) == 1  # within a minute there is the epoch's alone
    monkeypatch.setattr(progress, "_LINE_EVERY", 1e-9)
    made = fit(
        TinyModule(3), tmp_path / "two", LogLines(), max_epochs=2, accumulate_grad_batches=2, log_every_n_steps=2
    )
    lines = capsys.readouterr().out.splitlines()
    loss = made.progress_bar_metrics["train/loss"]
    steps = made.global_step
    assert re.fullmatch(rf"epoch 1/2  step 0/{steps}  loss [\d.]+  0 steps/s", lines[0])  # a batch of two
    assert re.fullmatch(rf"epoch 2/2  step {steps}/{steps}  loss {loss:.4g}  [\d.]+ steps/s", lines[-2])
    assert re.fullmatch(r"epoch 1/2  step 1/\d+  loss [\d.]+  [\d.]+ steps/s  ends \d\d:\d\d", lines[1])


def test_a_pass_shows_its_batches_and_the_use_of_the_experts(tmp_path, monkeypatch):
    shown: list[tuple[str, float, float | None, list[str]]] = []
    real = Bar.show

    def show(self: Bar, done: float, total: float | None = None, figures: dict[str, float] | None = None) -> None:
        real(self, done, total, figures)
        shown.append((self.name, self.done, self.total, list(self.figures)))

    monkeypatch.setattr(progress, "_DRAWN_EVERY", -1.0)
    monkeypatch.setattr(Bar, "show", show)
    module = TinyModule(3, moe=MOE)
    trainer = fit(module, tmp_path, PassBar(), max_epochs=1)
    assert shown == []  # a training has its own
    with bar("doctor", console=Console(file=io.StringIO(), force_terminal=True)) as whole:
        trainer.validate(module, TinyData(), verbose=False)
        trainer.predict(module, TinyData().val_dataloader(), return_predictions=False)
    (batches,) = trainer.num_val_batches
    used = ["imbalance", "dropped"]
    expected = [(name, n, batches, used) for name in ("validation", "predictions") for n in range(1, batches + 1)]
    assert shown == expected
    assert whole.done == 0


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
