"""The plan of a comparison and its files, and one training: stopped and resumed, in the search and in the end."""

from __future__ import annotations

import json

import pytest
from compared import experiment, overlay
from lightning.pytorch import Trainer
from refusals import refused

from apps.base.files import read_json, write_json
from apps.compare.options import CompareOptions
from apps.compare.training import Unit, shortened, train
from apps.compare.work import Plan, at_edge
from apps.runner.runner import differences


def test_differences_name_values_and_a_share_of_a_training_has_its_steps(tmp_path):
    saved = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert differences(saved, saved) == []
    assert differences(saved, {"a": {"b": 2, "c": (1, 2)}}) == ["a.b: 1 saved, 2 now", "d: 4 saved, null now"]
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert (read_json(path), [p.name for p in tmp_path.iterdir()]) == ({"x": 1}, ["a.json"])
    assert read_json(tmp_path / "b.json") is None
    path.write_text('{"x"')
    refused(r"a\.json is not a JSON file .*: delete it", read_json, path)
    assert shortened({"max_epochs": 10, "max_steps": -1}, 0.25) == {"max_epochs": 2, "max_steps": -1}
    assert shortened({"max_epochs": None, "max_steps": 1000}, 0.3)["max_steps"] == 300
    assert shortened({"max_epochs": 1}, 0.1)["max_epochs"] == 1


def test_networks_search_around_the_configured_rate_and_estimators_for_their_minutes():
    plan = Plan.make({}, CompareOptions(num_seeds=2), configured_rate=0.01, seed=7)
    assert (plan.rates, plan.seeds) == ((0.00333, 0.01, 0.03), (7, 8))
    assert plan.search_seed not in plan.seeds
    assert [u.rate for u in plan.search_units("sparse")] == [0.00333, 0.01, 0.03]
    assert at_edge(0.03, plan.rates)
    assert not at_edge(0.01, plan.rates)
    single = Plan.make({}, CompareOptions(learning_rates=(0.5,)), 0.01, 0)
    assert single.search_units("sparse") == []
    assert not at_edge(0.5, single.rates)
    plan = Plan.make({}, CompareOptions(num_seeds=2, baseline_minutes=0.5), 0.01, 7)
    (search,) = plan.tuning_units("trees")
    finals = plan.final_units("trees", None, tunes=True)
    assert search.name == "trees/search-0.5min-seed1007"
    assert [u.name for u in finals] == ["trees/final-0.5min-seed7", "trees/final-0.5min-seed8"]
    assert [u.search for u in finals] == [search, search]
    assert plan.final_units("rule", None)[0].search is None


@pytest.mark.parametrize("values, message", [
    ({"num_seeds": 0}, "seeds=0 must be at least 1"),
    ({"learning_rates": (0.1, -1.0)}, "learning_rates: -1 must be a positive number"),
    ({"learning_rates": (0.1, 0.1)}, "names a rate twice"),
    ({"search_share": 0.0}, "search_share=0 must be above 0"),
    ({"rounds": -1}, "rounds=-1 must not be negative"),
    ({"baseline_minutes": 0.0}, "baseline_minutes=0 must be a positive number"),
])  # fmt: skip
def test_options_out_of_range(values, message):
    refused(message, CompareOptions, **values)


def test_another_plan_or_an_edited_overlay_is_another_comparison(tmp_path):
    def claim(width: int) -> None:
        Plan.make({"model": {"width": width}}, CompareOptions(routers=(name,)), 0.01, 0).claim(tmp_path)

    name = overlay(tmp_path / "switch.yaml", top_k=1)
    for _ in range(2):
        claim(8)
    refused(r"another comparison \(config\.model\.width: 8 saved, 16 now\)", claim, 16)
    overlay(tmp_path / "switch.yaml", top_k=3)
    refused(r"options\.routers\.router_switch\.moe\.router\.top_k: 1 saved, 3 now", claim, 8)


def test_a_plan_with_class_paths_of_before_is_the_same_comparison(tmp_path):
    callbacks = [{"class_path": "apps.train.optim.schedules.GrowingTopK"}]
    before = {"model": {"class_path": "apps.vision.module.VisionClassifier"}, "trainer": {"callbacks": callbacks}}
    now = {"model": {"class_path": "VisionClassifier"}, "trainer": {"callbacks": [{"class_path": "GrowingTopK"}]}}
    for config in (before, now):
        Plan.make(config, CompareOptions(), 0.01, 0).claim(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["config"] == now


def test_a_plan_takes_other_systems_and_rounds_and_more_seeds(tmp_path):
    switch, hashed = overlay(tmp_path / "switch.yaml", top_k=1), overlay(tmp_path / "hash.yaml", "Hash")

    def claim(seeds: int, baselines: tuple[str, ...] | None, *names: str, share: float = 1.0, **more: float) -> None:
        options = CompareOptions(num_seeds=seeds, baselines=baselines, routers=names, search_share=share, **more)
        Plan.make({}, options, 0.01, 0).claim(tmp_path)

    claim(2, ("a",), switch)
    claim(3, ("b", "a"), hashed, switch)
    refused(r"options\.num_seeds: 3 saved, 2 now; seeds", claim, 2, ("a", "b"), hashed, switch)
    claim(3, ("a",), hashed, switch)
    claim(3, (), hashed)
    claim(3, None, hashed, rounds=0)
    claim(3, ("a", "b"), hashed, baseline_minutes=0.5)
    refused(r"search_share: 1\.0 saved, 0\.5 now", claim, 4, None, hashed, switch, share=0.5)
    # A router that was left out is remembered as it was trained.
    overlay(tmp_path / "switch.yaml", top_k=3)
    refused(r"options\.routers\.router_switch\.moe\.router\.top_k: 1 saved, 3 now", claim, 3, None, hashed, switch)
    overlay(tmp_path / "switch.yaml", top_k=1)
    claim(3, None, hashed, switch)


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


def test_an_early_stop_ends_no_run_and_a_search_keeps_no_checkpoint(config, tmp_path):
    options = "{monitor: val/loss, mode: max, patience: 1}"
    stops = f"callbacks: [{{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {options}}}]"
    path = tmp_path / "stops.yaml"
    path.write_text(config.read_text().replace("accelerator: cpu}", f"accelerator: cpu, {stops}}}"))
    result = train(experiment(path, "--trainer.max_epochs", "3"), Unit("sparse", 0.01, 0), tmp_path)
    assert result["steps"] == 18  # all systems have the same budget
    unit = Unit("dense_equal_flops", 0.01, 0, share=0.5)
    result = train(experiment(config), unit, tmp_path)
    assert "test" not in result
    assert result["steps"] == 6  # one epoch of two
    assert [p.name for p in unit.folder(tmp_path).iterdir()] == ["result.json"]
