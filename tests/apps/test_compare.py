"""``moesaic compare``: its statistics by hand, its refusals, and that what is finished is not done again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import move_data_to_device

import core
from apps import routers
from apps.cli import main as moesaic
from apps.compare import command, training
from apps.compare.experiment import Experiment, arguments
from apps.compare.files import differences, locked, read_json, write_json
from apps.compare.plan import Options, Plan, at_edge
from apps.compare.stats import Interval, choose, mean_interval, paired_difference, quality_at, verdict
from apps.compare.summary import summarize
from apps.compare.systems import Cost, System, check_equal, claim, find_systems, label, measure_cost
from apps.compare.table import _parts, cells, markdown
from apps.compare.training import Unit, shortened, train

ROOT = Path(__file__).resolve().parents[2]

# E=4, K=2, F=8 at D=8. Router 2*8*4 = 64 FLOPs a token, experts 2 * 4*8*8 = 512: 576. Dense F = 576 / 32 = 18.
# Parameters: router 32, experts 4 * 2*8*8 = 512: 544. Dense F = 544 / 16 = 34.
CONFIG = """
model:
  class_path: compare_app.TinyModel
  init_args:
    moe:
      num_experts: 4
      expert: {class_path: core.FFN, init_args: {hidden_dim: 8}}
    optimizer: {lr: 0.01}
data: {class_path: compare_app.TinyData}
trainer: {max_epochs: 2, accelerator: cpu}
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def experiment(config: Path, *rest: str) -> Experiment:
    return Experiment(arguments(config, [], rest))


def offers(*names: str) -> tuple[str, str]:
    return "--model.offers", json.dumps(list(names))


# ---- statistics


def test_mean_interval_is_students_t():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.30265, half width 4.30265 / sqrt(3) = 2.48414
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(2.48414, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert not interval.excludes_zero


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) == Interval(0.5, None, 1)
    assert verdict(mean_interval([0.5])) == "no difference shown"


def test_pairing_removes_what_both_share():
    # Seeds differ by 10 points, the two systems by 1.0, 1.1, 0.9: mean 1, deviation 0.1, half 4.30265 * 0.1 / sqrt(3)
    difference = paired_difference([91.0, 81.1, 70.9], [90.0, 80.0, 70.0])
    assert difference.mean == pytest.approx(1.0)
    assert difference.half_width == pytest.approx(0.24841, abs=1e-4)
    assert verdict(difference) == "wins"
    assert verdict(difference, higher_is_better=False) == "loses"


def test_equal_differences_are_no_evidence():
    # An interval of width 0 only says that the seeds agree.
    assert verdict(paired_difference([2.0, 3.0], [1.0, 2.0])) == "no difference shown"


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])


def test_quality_at_is_the_last_validation_in_time():
    curve = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6)]
    assert quality_at(curve, 0.9) is None
    assert quality_at(curve, 2.0) == 0.7
    assert quality_at(curve, 9.0) == 0.6


def test_choose_takes_the_best_rate_and_of_equal_ones_the_nearest():
    rates = (0.1, 0.3, 0.9)
    assert choose(rates, [0.5, 0.7, 0.6], 0.3) == 1
    assert choose(rates, [0.5, 0.7, 0.6], 0.3, higher_is_better=False) == 0
    assert choose(rates, [0.7, 0.6, 0.7], 0.2) == 0  # 0.1 is 2 times off, 0.9 is 4.5 times
    assert choose(rates, [None, 0.2, math.nan], 0.3) == 1
    with pytest.raises(ValueError, match=r"diverged at every learning rate of 0\.1, 0\.3, 0\.9"):
        choose(rates, [None, None, None], 0.3)


# ---- files and plan


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


def test_a_folder_is_held_by_one_comparison(tmp_path):
    with (
        locked(tmp_path / "c"),
        pytest.raises(ValueError, match="another comparison is running"),
        locked(tmp_path / "c"),
    ):
        pass


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


def test_shortened():
    assert shortened({"max_epochs": 10, "max_steps": -1}, 0.25) == {"max_epochs": 2, "max_steps": -1}
    assert shortened({"max_epochs": None, "max_steps": 1000}, 0.3)["max_steps"] == 300
    assert shortened({"max_epochs": 1}, 0.1)["max_epochs"] == 1


# ---- what may be called equal


def test_names_say_what_is_claimed():
    assert claim("dense_equal_flops") == "flops"
    assert claim("dense_equal_params") == "params"
    assert claim("shared_bottom") is None
    assert label("dense_equal_flops") == "dense, equal FLOPs"


@pytest.mark.parametrize("ratio, refused", [(1.0, False), (1.049, False), (0.951, False), (1.06, True), (0.94, True)])
def test_five_percent(ratio, refused):
    mine, its = (Cost(10, 10, 9e9, replaced_flops_per_example=r * 1000, replaced_params=100) for r in (1.0, ratio))
    reason = check_equal("dense_equal_flops", mine, its)
    assert bool(reason) == refused
    if refused:
        assert f"take {ratio * 1000:,.0f} FLOPs an example, the sparse model's 1,000: {ratio:.3f}" in reason
    assert check_equal("shared_bottom", mine, its) == ""


def test_cost_is_counted_by_hand(config):
    tried = experiment(config)
    model, data = tried.build("sparse")
    cost = measure_cost(model, next(iter(data.val_dataloader())), tried.replaced)
    # A point has 4 tokens: block 4 * 576; embedding 2 * 2*32 = 128; head 2 * 8*3 = 48.
    assert cost.replaced_flops_per_example == 4 * 576
    assert cost.flops_per_example == 4 * 576 + 128 + 48
    assert cost.replaced_params == 544
    # embedding 64 + 32, head 24 + 3
    assert cost.num_params == 544 + 96 + 27
    assert cost.active_params == 32 + 256 + 96 + 27
    assert model.training


def test_capacity_does_not_hide_cost(config):
    tried = experiment(config, "--model.moe.capacity_factor", "1.0")
    model, data = tried.build("sparse")
    batch = next(iter(data.val_dataloader()))
    assert measure_cost(model, batch, tried.replaced).replaced_flops_per_example == 4 * 576
    assert measure_cost(model, batch, tried.replaced, as_evaluated=True).replaced_flops_per_example < 4 * 576


def test_a_false_claim_is_left_out_with_its_reason(config):
    names = ("dense_equal_flops", "dense_double_equal_flops", "dense_equal_params", "centroids", "none")
    model, data = experiment(config, *offers(*names)).build("sparse")
    found = {s.name: s for s in find_systems(model, next(iter(data.val_dataloader())))}
    assert list(found) == ["sparse", *names]
    assert not found["dense_equal_flops"].refused
    assert found["dense_equal_flops"].replaced_ratio == 1.0
    assert found["dense_double_equal_flops"].refused == (
        "not called equal: its replaced blocks take 4,608 FLOPs an example, the sparse model's 2,304: "
        "2.000 of them, and the rule is within 5%"
    )
    assert found["dense_equal_params"].params_ratio == 1.0
    assert found["centroids"].cost is None
    assert found["none"].refused == "it coincides with another"


@dataclass(frozen=True)
class Points:
    """A batch that is no tuple of tensors."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Points:
        return Points(self.x.to(device), self.y.to(device))


def test_a_batch_may_be_an_object_and_a_block_may_hold_the_layers(config, monkeypatch):
    model, data = experiment(config).build("sparse")
    kind = type(model)
    x, y = next(iter(data.val_dataloader()))
    whole = measure_cost(model, (x, y), ("block",))
    monkeypatch.setattr(kind, "example_inputs", lambda self, batch: (batch,))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, batch: forward(self, batch.x))
    assert measure_cost(model, Points(x, y), ("block",)) == whole
    moved = move_data_to_device(Points(x, y), torch.device("cpu"))
    assert isinstance(moved, Points)
    # The MoE layer inside a block that the baseline has under the same name, and not under the layer's.
    monkeypatch.setattr(kind, "replaced_blocks", ("block",))
    model.block = torch.nn.Sequential(model.block)
    assert list(core.moe_layers(model)) == ["block.0"]
    found = find_systems(model, Points(x, y))
    assert [s.refused for s in found] == ["", ""]
    assert found[1].replaced_ratio == 1.0
    monkeypatch.setattr(kind, "example_inputs", lambda self, batch: ())
    with pytest.raises(ValueError, match="example_inputs gives nothing, which has no length to count examples by"):
        measure_cost(model, Points(x, y), ())


def test_nothing_to_compare_with(config):
    model, data = experiment(config, *offers("dense_double_equal_flops")).build("sparse")
    batch = next(iter(data.val_dataloader()))
    with pytest.raises(ValueError, match="nothing to compare with: dense_double_equal_flops: not called equal"):
        find_systems(model, batch)
    with pytest.raises(ValueError, match="baseline 'dense' is unknown: the module has dense_double_equal_flops"):
        find_systems(model, batch, ["dense"])
    model.moe, model.block = None, torch.nn.Identity()
    with pytest.raises(ValueError, match="TinyModel has no MoE layer"):
        find_systems(model, batch)


# ---- one unit


def test_a_stopped_unit_goes_on_to_the_same_result(config, tmp_path):
    tried, unit = experiment(config, "--trainer.max_epochs", "3"), Unit("sparse", 0.01, 5, final=True)
    whole = train(tried, unit, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 8:  # of 18, in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tried, unit, tmp_path / "stopped", stop)
    assert unit.read(tmp_path / "stopped") is None
    steps = []
    resumed = train(tried, unit, tmp_path / "stopped", lambda done, total: steps.append(done))
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
    assert sorted(p.name for p in unit.folder(tmp_path).iterdir()) == ["average.ckpt", "last.ckpt", "result.json"]
    # What the checkpoints give by themselves: the average the figures, the weights in training the curve.
    module, data = tried.build("sparse")
    alone = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for name, quality in (("average.ckpt", result["quality"]), ("last.ckpt", result["curve"][-1][2])):
        where = {"datamodule": data, "ckpt_path": str(unit.folder(tmp_path) / name), "verbose": False}
        (found,) = alone.validate(module, **where, weights_only=True)
        assert found["val/top1"] == pytest.approx(quality)
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


# ---- the numbers

MEASURED = {"sparse": {"seconds_per_step": 0.3}, "dense_equal_flops": {"seconds_per_step": 0.2}}


def finished(test: float, curve: list[tuple[int, float, float]], **further: float) -> dict:
    logged = {f"test/{name}": value for name, value in {"top1": test, **further}.items()}
    return {
        "test": logged,
        "test_quality": test,
        "train_seconds": curve[-1][1],
        "steps": curve[-1][0],
        "curve": curve,
    }


def summary(speeds: dict | None = None, others: dict | None = None, further: tuple[str, ...] = ()):
    found = [System("sparse", ""), System("dense_equal_flops", "wide"), System("trees", "", refused="no library")]
    finals = {
        "sparse": [
            finished(0.9, [(5, 2.0, 0.6), (10, 4.0, 0.9)], auc_a=0.95, log_loss_a=0.4),
            finished(0.8, [(5, 3.0, 0.5), (10, 6.0, 0.8)], auc_a=0.93, log_loss_a=0.6),
        ],
        "dense_equal_flops": [
            finished(0.7, [(5, 1.0, 0.5), (10, 2.0, 0.7)], auc_a=0.92),
            finished(0.7, [(5, 2.0, 0.4), (10, 4.0, 0.7)], auc_a=0.92),
        ],
    }
    rates = {"sparse": (0.1, True), "dense_equal_flops": (0.1, False), "forest": (None, False)}
    if others:
        found.append(System("forest", "no steps"))
        finals |= others
    return summarize(found, finals, rates, speeds or {}, "test/top1", True, (0, 1), further)


def test_equal_time_ends_when_the_fastest_ends():
    s = summary()
    # Dense ends after 2 s and 4 s; by then sparse had reached 0.6 and 0.5.
    assert s.clock == "recorded"
    assert s.equal_seconds == (2.0, 4.0)
    sparse, dense = s.rows
    assert sparse.equal_time.mean == pytest.approx(0.55)
    assert dense.equal_time.mean == pytest.approx(0.7)
    assert dense.equal_time_difference.mean == pytest.approx(-0.15)
    assert dense.difference.mean == pytest.approx(0.15)
    assert [left.name for left in s.left_out] == ["trees"]


def test_equal_time_takes_the_measured_step_where_there_is_one():
    s = summary(MEASURED)
    # 10 steps of 0.2 s; sparse has done 6 of its own by then, its last validation was after 5.
    assert s.clock == "steps"
    assert s.equal_seconds == (2.0, 2.0)
    assert s.rows[0].equal_time.mean == pytest.approx(0.55)


def test_a_poor_bleu_is_no_share():
    # In 0..1, as a share would be: it is in points already.
    systems = [System("sparse", "")]
    finals = {"sparse": [finished(0.4, [(5, 2.0, 0.4)], chrf=0.9, token_accuracy=0.1)]}
    further = ("chrf", "token_accuracy")
    s = summarize(systems, finals, {"sparse": (0.1, False)}, {}, "test/bleu", True, (0,), further)
    assert not s.percent
    assert s.shares == ("token_accuracy",)


def test_an_estimator_takes_no_part_in_equal_time():
    forest = [finished(0.6, [(None, 0.5, 0.6)]), finished(0.6, [(None, 0.5, 0.6)])]
    for speeds, seconds in (({}, (2.0, 4.0)), (MEASURED, (2.0, 2.0))):
        s = summary(speeds, {"forest": forest})
        assert s.equal_seconds == seconds  # not the 0.5 s of the forest
        assert s.clock == ("steps" if speeds else "recorded")
        row = s.rows[2]
        assert (row.equal_time, row.equal_time_difference) == (None, None)
        assert row.difference.mean == pytest.approx(0.25)
        assert row.train_seconds == 0.5
    assert "Models without steps take no part." in markdown("T", s, [])


def test_further_metrics_have_a_line_each_with_the_paired_difference():
    forest = [finished(0.6, [(None, 0.5, 0.6)], auc_a=0.9), finished(0.6, [(None, 0.5, 0.6)], auc_a=0.9)]
    s = summary(others={"forest": forest}, further=("auc_a", "log_loss_a", "auc_b"))
    assert "auc_a" in s.shares
    assert "log_loss_a" not in s.shares
    table = cells(s)
    titles = [line[0] for line in table]
    place = titles.index("test auc_a, %")
    # Differences to the dense model 0.03, 0.01: mean 0.02, half 12.706 * 0.01; to the forest 0.05, 0.03.
    assert table[place][1:] == ["94.00 ± 12.71", "92.00 ± 0.00", "90.00 ± 0.00"]
    assert table[place + 1] == ["  sparse minus it, points", "–", "+2.00 ± 12.71", "+4.00 ± 12.71"]
    # A loss is shown as it is; only the sparse model reports it here.
    assert table[titles.index("test log_loss_a")][1:] == ["0.5 ± 1.271", "–", "–"]
    assert not any("auc_b" in title for title in titles)  # nobody reports it


def test_a_wide_table_is_shown_in_parts_that_fit():
    rows = [["", "sparse", "dense, equal FLOPs", "trees"], ["test top1, %", "94.00 ± 12.71", "92.00 ± 0.00", "–"]]
    # First column 4 + 12; then 3 + 13, 3 + 12, 3 + 5.
    assert _parts(rows, 55) == [[0, 1, 2, 3]]
    assert _parts(rows, 54) == [[0, 1, 2], [0, 3]]
    assert _parts(rows, 10) == [[0, 1], [0, 2], [0, 3]]


def test_sentences_say_what_the_interval_allows():
    # Differences 0.2 and 0.1: mean 0.15, half t(0.975, 1) * 0.0707 / sqrt(2) = 12.706 * 0.05 = 0.635
    first, second = summary().sentences()
    assert first == (
        "Against dense, equal FLOPs: no difference shown at this budget (sparse minus dense +15.00 points; "
        "95 % interval -48.53 to +78.53 points, 2 seeds, which holds 0)."
    )
    assert second.startswith(
        "Against dense, equal FLOPs: no difference shown at equal training time, on validation data"
    )


def test_table_shows_intervals_edges_and_what_was_left_out():
    s = summary()
    rows = {line[0].strip(): line[1:] for line in cells(s)}
    assert rows[""] == ["sparse", "dense, equal FLOPs"]
    assert rows["test top1, %"][1] == "70.00 ± 0.00"
    assert rows["learning rate"] == ["0.1 (edge)", "0.1"]
    assert "training, examples/s" not in rows  # not measured
    page = markdown("T", s, ["a fact"])
    assert "trees: left out: no library." in page
    assert "Best at the edge of the learning rates tried: sparse (0.1)" in page
    assert page.endswith("- a fact\n")


# ---- the whole


def test_compare_end_to_end_and_again(config, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    argv = ["compare", str(config), "--seeds", "2", "--output", str(output), "--rounds", "0", *offers(
        "dense_equal_flops", "dense_double_equal_flops", "centroids"), "--model.further", '["top2"]']  # fmt: skip
    stop_after, done = 4, []
    real = training.train

    def stopping(*args, **kwargs):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **kwargs)

    monkeypatch.setattr(command, "train", stopping)
    assert moesaic(argv) == 130
    assert f"To go on: moesaic compare {config}" in capsys.readouterr().err
    stop_after = 99
    assert moesaic(argv) == 0
    # 3 rates of two systems, then 2 seeds of three: each once, the four before the stop not again.
    assert len(done) == len(set(done)) == 12
    out = capsys.readouterr().out
    assert "left out: not called equal" in out.replace("\n", " ")
    results = json.loads((output / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert len(results["finals"]["centroids"]) == 2
    assert results["summary"]["rows"][1]["system"]["replaced_ratio"] == 1.0
    assert results["machine"]["torch"] == torch.__version__
    assert (output / "quality_against_flops.png").stat().st_size > 5000
    page = (output / "table.md").read_text()
    assert "| test top1, % |" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| test top2, % |"))
    assert line.endswith("| – |")  # the centroids know no second class

    monkeypatch.setattr(command, "train", lambda *a: pytest.fail("trained again"))
    assert moesaic(argv) == 0
    assert json.loads((output / "results.json").read_text()) == results
    capsys.readouterr()
    assert moesaic([*argv, "--seeds", "3"]) == 1
    assert "options.num_seeds: 2 saved, 3 now" in capsys.readouterr().err


def test_the_examples_of_two_tests_are_compared_seed_by_seed(config, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["compare", str(config), "--seeds", "2", "--output", str(output), "--rounds", "0",
            "--learning_rates", "0.01", *offers("dense_equal_flops", "centroids"),
            "--model.keeps_examples", "true"]  # fmt: skip
    assert moesaic(argv) == 0
    found = json.loads((output / "results.json").read_text())
    pairs = found["summary"]["examples"]
    assert [(p["system"], p["seed"]) for p in pairs] == [("dense_equal_flops", 0), ("dense_equal_flops", 1)]
    rows = {row["system"]["name"]: found["finals"][row["system"]["name"]] for row in found["summary"]["rows"]}
    for seed, pair in enumerate(pairs):  # of 48 points
        by_metric = [rows[name][seed]["test"]["test/top1"] for name in ("sparse", "dense_equal_flops")]
        difference = pair["differences"][0]["difference"]
        assert difference == pytest.approx(48 * (by_metric[0] - by_metric[1]))
        line = f"Against dense, equal FLOPs, seed {seed}: right points difference {difference:+.2f} "
        assert (
            f"{line}[{difference - 1:+.2f}, {difference + 1:+.2f}], p = 0.500: not significant (counted)."
            in (output / "table.md").read_text()
        )
    # Of parts of the examples on the page alone.
    assert "right halves difference +0.00 [+0.00, +0.00], p = 0.010: significant" in (output / "table.md").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "right points difference" in shown
    assert "right halves" not in shown
    assert found["signatures"] == {"top1": "micro"}
    assert "- top1: micro." in (output / "table.md").read_text()


def test_baselines_start_from_the_generators_state_alone(config):
    tried = experiment(config)
    heads = []
    for system in ("sparse", "dense_equal_flops", "dense_equal_flops"):
        torch.manual_seed(3)
        heads.append(tried.module(system).embed.weight)
    assert torch.equal(heads[0], heads[1])  # drawn first, in both
    assert torch.equal(heads[1], heads[2])


def test_workers_train_and_measure(config, tmp_path):
    argv = [str(config), "--seeds", "2", "--learning_rates", "0.01", "--rounds", "1", "--jobs", "2"]
    outcome = command.run_command([*argv, "--output", str(tmp_path / "two")])
    alone = command.run_command([*argv[:-2], "--rounds", "0", "--output", str(tmp_path / "one")])
    assert [r.test for r in outcome.summary.rows] == [r.test for r in alone.summary.rows]
    assert outcome.summary.clock == "steps"
    for row in outcome.summary.rows:
        assert row.speed["train_examples_per_second"] > 0
        assert row.speed["inference_examples_per_second"] > 0
        assert row.speed["peak_memory_bytes"] > row.speed["base_memory_bytes"] > 0
        assert row.speed["cost"]["replaced_flops_per_example"] == 4 * 576


def test_a_workers_error_is_the_commands(config, tmp_path):
    argv = [str(config), "--seeds", "2", "--learning_rates", "1", "--rounds", "0", "--jobs", "2"]
    with pytest.raises(RuntimeError, match="the training loss is nan"):
        command.run_command([*argv, "--output", str(tmp_path), "--model.explodes_from", "0.5"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sedes", "3"], "--sedes is no option of moesaic compare"),
        (["extra"], "extra is no option"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--baselines", "boosted"], "baseline 'boosted' is unknown: the module has dense_equal_flops"),
        (["--trainer.max_epoch", "3"], "did you mean 'trainer.max_epochs'"),
        (["--model.moe.num_experts", "1"], "top_k=2 exceeds num_experts=1"),
        (["--trainer.fast_dev_run", "true"], "a comparison needs whole runs"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, capsys, argv, message):
    assert moesaic(["compare", str(config), "--output", str(tmp_path / "o"), *argv]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_compare_digits(tmp_path, capsys):
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "1"]
    argv = ["compare", str(ROOT / "configs/vision/digits.yaml"), "--seeds", "2", "--learning_rates", "0.004"]
    assert moesaic([*argv, "--rounds", "0", "--output", str(tmp_path / "digits"), *few]) == 0
    assert "dense, equal parameters" in (tmp_path / "digits" / "table.md").read_text()
    assert (tmp_path / "digits" / "quality_against_flops.png").exists()
    assert "lightning" not in capsys.readouterr().err.lower()


def overlay(path: Path, kind: str = "TokenChoice", **options: object) -> str:
    router = {"class_path": f"core.{kind}", "init_args": options}
    path.write_text(json.dumps({"model": {"init_args": {"moe": {"router": router}}}}))
    return str(path)


def test_routers_are_compared_at_equal_active_flops(config, tmp_path, capsys):
    switch = overlay(tmp_path / "switch.yaml", top_k=1)
    # One expert a token where the config has two: 576 = 64 + 4 * 8 * F, so F = 16 in place of 8.
    made = routers.Variant(experiment(config).module("sparse"), switch).config()
    assert (made.router.top_k, made.expert.hidden_dim, made.flops_per_token(8)) == (1, 16, 576)
    too_many = overlay(tmp_path / "too_many.yaml", top_k=5)
    task = overlay(tmp_path / "task.yaml", "Task", num_tasks=2, top_k=2)
    domain = overlay(tmp_path / "domain.yaml", "Domain", num_domains=4)
    output = tmp_path / "out"
    argv = ["compare", str(config), "--seeds", "2", "--output", str(output), "--rounds", "1", "--jobs", "2",
            "--learning_rates", "0.01", "--routers", switch, too_many, task, domain]  # fmt: skip
    assert moesaic(argv) == 0
    page = (output / "table.md").read_text()
    assert [line.split(" |")[0] for line in page.splitlines() if line.startswith("| ")] == [
        *("| router", "| ---"),
        *("| the config's", "| switch"),
    ]
    assert "too_many: left out: top_k=5 exceeds num_experts=4." in page
    assert "task: left out: needs context.task_ids_B, which TinyModel does not give." in page
    # Evaluation can do without.
    assert (
        "domain: left out: Domain needs context.domain_ids_B or domain_weights_BE in training: both are None." in page
    )
    found = json.loads((output / "results.json").read_text())["summary"]["rows"]
    assert [row["system"]["name"] for row in found] == ["sparse", "router_switch"]
    assert found[1]["system"]["replaced_ratio"] == 1.0
    assert 1 <= found[1]["routing"]["load_imbalance"] <= 4
    assert found[1]["routing"]["drop_rate"] == 0


def test_two_routers_may_not_share_a_name(config, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = overlay(tmp_path / "a" / "mine.yaml"), overlay(tmp_path / "b" / "mine.yaml", top_k=1)
    with pytest.raises(ValueError, match=f"routers {first} and {second} would both be 'mine' in the table: rename"):
        routers.resolve([first, second])
    assert routers.resolve([first, str(tmp_path / "b" / ".." / "a" / "mine.yaml")]) == (first,)
    with pytest.raises(ValueError, match="would both be 'mine'"):
        routers.variants(experiment(config).module("sparse"), [first, second])
    argv = ["compare", str(config), "--output", str(tmp_path / "o"), "--routers", first, second]
    assert moesaic(argv) == 1
    assert "would both be 'mine' in the table" in capsys.readouterr().err


def test_an_unknown_router_is_named(config, tmp_path, capsys):
    assert moesaic(["compare", str(config), "--output", str(tmp_path / "o"), "--routers", "swich"]) == 1
    assert "router 'swich' is neither a file nor one of" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("model: {}")
    assert (
        moesaic(["compare", str(config), "--output", str(tmp_path / "o"), "--routers", str(tmp_path / "bad.yaml")]) == 1
    )
    assert "bad.yaml has no model.init_args.moe.router with a class_path" in capsys.readouterr().err


def test_help(capsys):
    assert moesaic(["compare", "--help"]) == 0
    assert "--learning_rates" in capsys.readouterr().out
