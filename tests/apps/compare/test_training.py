"""One training of a comparison: stopped and resumed, in the search and in the end."""

from __future__ import annotations

import pytest
from compared import experiment
from lightning.pytorch import Trainer

from apps.compare.training import Unit, train


def test_a_stopped_unit_goes_on_to_the_same_result(config, tmp_path):
    tried, unit = experiment(config, "--trainer.max_epochs", "3"), Unit("sparse", 0.01, 5, final=True)
    whole = train(tried, unit, tmp_path / "whole")

    def stop(done: int, total: int, figures: dict[str, float]) -> None:
        if done == 8:  # of 18, in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tried, unit, tmp_path / "stopped", stop)
    assert unit.read(tmp_path / "stopped") is None
    steps = []
    resumed = train(tried, unit, tmp_path / "stopped", lambda done, total, figures: steps.append(done))
    assert steps == list(range(7, 19))  # from the end of the first epoch
    assert resumed["test"] == whole["test"]
    assert [(s, q) for s, _, q in resumed["curve"]] == [(s, q) for s, _, q in whole["curve"]]
    assert resumed["steps"] == 18
    assert unit.checkpoint(tmp_path / "stopped").exists()


def test_a_rate_that_diverges_is_recorded_in_the_search_and_an_error_in_the_end(config, tmp_path):
    tried = experiment(config, "--model.explodes_from", "0.5")
    result = train(tried, Unit("sparse", 0.5, 0), tmp_path)
    assert result["quality"] is None
    assert "nan" in result["diverged"]
    with pytest.raises(RuntimeError, match=r"sparse/final-lr0\.5-seed0: the training loss is nan at step 1"):
        train(tried, Unit("sparse", 0.5, 0, final=True), tmp_path)


def test_a_search_reads_no_test_data_and_keeps_no_checkpoint(config, tmp_path):
    unit = Unit("dense_equal_flops", 0.01, 0, share=0.5)
    result = train(experiment(config), unit, tmp_path)
    assert "test" not in result
    assert result["steps"] == 6  # one epoch of two
    assert [p.name for p in unit.folder(tmp_path).iterdir()] == ["result.json"]


def test_a_module_that_averages_its_last_epochs_is_chosen_and_tested_by_the_average(config, tmp_path, monkeypatch):
    tried = experiment(config, "--trainer.max_epochs", "3", "--model.average_last", "2")
    unit = Unit("sparse", 0.01, 0, final=True)
    result = train(tried, unit, tmp_path)
    assert unit.checkpoint(tmp_path).name == "average.ckpt"
    files = ["average.ckpt", "last.ckpt", "metrics.csv", "result.json"]
    assert sorted(p.name for p in unit.folder(tmp_path).iterdir()) == files
    # What the checkpoints give by themselves: the average the figures, the weights in training the curve.
    module, data = tried.build("sparse")
    alone = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for name, quality in (("average.ckpt", result["quality"]), ("last.ckpt", result["curve"][-1][2])):
        where = {"datamodule": data, "ckpt_path": str(unit.folder(tmp_path) / name), "verbose": False}
        (validated,) = alone.validate(module, **where, weights_only=True)
        assert validated["val/top1"] == pytest.approx(quality)
        (tested,) = alone.test(module, **where, weights_only=True)
        assert (tested["test/loss"] == pytest.approx(result["test"]["test/loss"])) == (name == "average.ckpt")
    assert [step for step, _, _ in result["curve"]] == [6, 12, 18]
    search = Unit("sparse", 0.01, 0)
    train(tried, search, tmp_path)
    assert [p.name for p in search.folder(tmp_path).iterdir()] == ["result.json"]


def test_an_early_stop_of_the_config_ends_no_run_of_a_comparison(config, tmp_path):
    config.write_text(config.read_text().replace("accelerator: cpu}", "accelerator: cpu, callbacks: [{class_path: "
        "lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss, mode: max, patience: 1}}]}"
    ))  # fmt: skip
    result = train(experiment(config, "--trainer.max_epochs", "3"), Unit("sparse", 0.01, 0), tmp_path)
    assert result["steps"] == 18  # all systems have the same budget
