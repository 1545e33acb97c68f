"""The plan of a comparison and its files: what is saved, whole or not at all."""

from __future__ import annotations

import json

import pytest
from compared import overlay

from apps.base.files import read_json, write_json
from apps.compare.options import Options
from apps.compare.training import shortened
from apps.compare.work import Plan, at_edge
from apps.runner.runner import differences


def test_differences_name_the_values():
    saved = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert differences(saved, saved) == []
    assert differences(saved, {"a": {"b": 2, "c": (1, 2)}}) == ["a.b: 1 saved, 2 now", "d: 4 saved, null now"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "b.json") is None
    path.write_text('{"x"')
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file .*: delete it"):
        read_json(path)


def test_plan_searches_around_the_configured_rate_with_a_seed_of_its_own():
    plan = Plan.make({}, Options(num_seeds=2), configured_rate=0.01, seed=7)
    assert plan.rates == (0.00333, 0.01, 0.03)
    assert plan.seeds == (7, 8)
    assert plan.search_seed not in plan.seeds
    assert [u.rate for u in plan.search_units("sparse")] == [0.00333, 0.01, 0.03]
    assert at_edge(0.03, plan.rates)
    assert not at_edge(0.01, plan.rates)
    single = Plan.make({}, Options(learning_rates=(0.5,)), 0.01, 0)
    assert single.search_units("sparse") == []
    assert not at_edge(0.5, single.rates)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_seeds": 0}, "seeds=0 must be at least 1"),
        ({"learning_rates": (0.1, -1.0)}, "learning_rates: -1 must be a positive number"),
        ({"learning_rates": (0.1, 0.1)}, "names a rate twice"),
        ({"search_share": 0.0}, "search_share=0 must be above 0"),
        ({"rounds": -1}, "rounds=-1 must not be negative"),
        ({"baseline_minutes": 0.0}, "baseline_minutes=0 must be a positive number"),
    ],
)
def test_options_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_another_plan_in_the_folder_is_refused(tmp_path):
    plan = Plan.make({"model": {"width": 8}}, Options(), 0.01, 0)
    plan.claim(tmp_path)
    plan.claim(tmp_path)
    other = Plan.make({"model": {"width": 16}}, Options(), 0.01, 0)
    with pytest.raises(ValueError, match=r"another comparison \(config\.model\.width: 8 saved, 16 now\)"):
        other.claim(tmp_path)


def test_a_plan_with_class_paths_of_before_is_the_same_comparison(tmp_path):
    callbacks = [{"class_path": "apps.train.optim.schedules.GrowingTopK"}]
    before = {"model": {"class_path": "apps.vision.module.VisionClassifier"}, "trainer": {"callbacks": callbacks}}
    now = {"model": {"class_path": "VisionClassifier"}, "trainer": {"callbacks": [{"class_path": "GrowingTopK"}]}}
    for config in (before, now):
        Plan.make(config, Options(), 0.01, 0).claim(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["config"] == now


def test_an_edited_overlay_is_another_comparison(tmp_path):
    name = overlay(tmp_path / "switch.yaml", top_k=1)

    def claim() -> None:
        Plan.make({}, Options(routers=(name,)), 0.01, 0).claim(tmp_path)

    claim()
    claim()
    overlay(tmp_path / "switch.yaml", top_k=3)
    with pytest.raises(ValueError, match=r"options\.routers\.router_switch\.moe\.router\.top_k: 1 saved, 3 now"):
        claim()


def test_a_plan_takes_other_systems_and_rounds_and_more_seeds(tmp_path):
    switch, hashed = overlay(tmp_path / "switch.yaml", top_k=1), overlay(tmp_path / "hash.yaml", "Hash")

    def claim(seeds: int, baselines: tuple[str, ...] | None, *names: str, share: float = 1.0, **more: float) -> None:
        options = Options(num_seeds=seeds, baselines=baselines, routers=names, search_share=share, **more)
        Plan.make({}, options, 0.01, 0).claim(tmp_path)

    claim(2, ("a",), switch)
    claim(3, ("b", "a"), hashed, switch)
    with pytest.raises(ValueError, match=r"options\.num_seeds: 3 saved, 2 now; seeds"):
        claim(2, ("a", "b"), hashed, switch)
    claim(3, ("a",), hashed, switch)
    claim(3, (), hashed)
    claim(3, None, hashed, rounds=0)
    claim(3, ("a", "b"), hashed, baseline_minutes=0.5)
    with pytest.raises(ValueError, match=r"search_share: 1\.0 saved, 0\.5 now"):
        claim(4, None, hashed, switch, share=0.5)
    # A router that was left out is remembered as it was trained.
    overlay(tmp_path / "switch.yaml", top_k=3)
    with pytest.raises(ValueError, match=r"options\.routers\.router_switch\.moe\.router\.top_k: 1 saved, 3 now"):
        claim(3, None, hashed, switch)
    overlay(tmp_path / "switch.yaml", top_k=1)
    claim(3, None, hashed, switch)


def test_an_estimators_search_is_one_for_all_seeds_and_of_its_minutes():
    plan = Plan.make({}, Options(num_seeds=2, baseline_minutes=0.5), 0.01, 7)
    (search,) = plan.tuning_units("trees")
    finals = plan.final_units("trees", None, tunes=True)
    assert search.name == "trees/search-0.5min-seed1007"
    assert [u.name for u in finals] == ["trees/final-0.5min-seed7", "trees/final-0.5min-seed8"]
    assert [u.search for u in finals] == [search, search]
    assert plan.final_units("rule", None)[0].search is None


def test_shortened():
    assert shortened({"max_epochs": 10, "max_steps": -1}, 0.25) == {"max_epochs": 2, "max_steps": -1}
    assert shortened({"max_epochs": None, "max_steps": 1000}, 0.3)["max_steps"] == 300
    assert shortened({"max_epochs": 1}, 0.1)["max_epochs"] == 1
