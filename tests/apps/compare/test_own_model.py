"""``moesaic compare`` of a LightningModule of the user's own."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import fails
from own_net import CONFIG, SPARSIFY
from refusals import refused

from apps.cli import main
from apps.compare.experiment import Experiment, arguments
from apps.compare.measure import Job, _Bench
from apps.compare.options import CompareOptions
from apps.compare.work import Plan
from apps.report.page import html
from apps.train.lightning_internals import trainer_of

FEW = ("--seeds", "1", "--rounds", "0", "--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.yaml"
    path.write_text(CONFIG.replace("Points", "Stored") + SPARSIFY)
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The folder of a finished comparison with one seed at one learning rate."""
    argv = ["compare", str(config), "--output", str(config.parent / "out"), *FEW, "--learning_rates", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "script", lambda: "")
        patch.setattr(html, "png_of", lambda *_: b"")
        assert main(argv) == 0
    return config.parent / "out"


def test_sparse_and_dense_models_are_trained_tested_and_compared(whole) -> None:
    results = json.loads((whole / "results.json").read_text())
    rows = results["summary"]["rows"]
    assert [row["system"]["name"] for row in rows] == ["sparse", "dense_equal_flops", "dense_equal_params"]
    assert results["summary"]["metric"] == "test_acc"
    assert results["summary"]["percent"] is True
    assert all(len(results["finals"][row["system"]["name"]]) == 1 for row in rows)
    assert all(0 <= run["test_quality"] <= 1 for runs in results["finals"].values() for run in runs)
    assert results["finals"]["sparse"][0]["routing"]["load_imbalance"] >= 1
    page = (whole / "table.md").read_text()
    assert "| test acc, % |" in page
    assert "Against dense, equal FLOPs" in page


def test_every_model_begins_as_the_dense_one_and_has_the_rate_of_its_unit(config) -> None:
    experiment = Experiment(arguments(config, [], ()))
    assert experiment.rate == 0.1
    x, outputs = torch.randn(4, 2), []
    for system in ("sparse", "dense_equal_flops"):
        torch.manual_seed(7)
        model, _ = experiment.build(system, 0.3)
        assert model.module.lr == 0.3
        outputs.append(model.module.eval()(x))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_speed_is_that_of_the_modules_own_steps(whole, config) -> None:
    experiment = Experiment(arguments(config, [], ()))
    checkpoint = next((whole / "units" / "sparse").glob("*/last.ckpt"))
    bench = _Bench(Job(experiment.arguments, "sparse", str(checkpoint), 1))
    assert (bench.facts["cost"]["replaced_flops_per_example"], bench.facts["examples_per_step"]) == (1088, 16)
    before = [p.clone() for p in bench.module.parameters()]
    assert bench.train() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.module.parameters(), strict=True))
    assert bench.inference() > 0


def test_a_schedule_as_long_as_the_training_is_compared_and_its_speed_measured(config, tmp_path) -> None:
    path = tmp_path / "scheduled.yaml"
    path.write_text(CONFIG.replace("own_net.Net", "own_net.Scheduled").replace("Points", "Stored") + SPARSIFY)
    own = (str(path), "--output", str(tmp_path / "out"), "--baselines", "dense_equal_flops", "--learning_rates", "0.2")
    assert main(["compare", *own, *FEW, "--rounds", "1"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [results["finals"][name][0]["steps"] for name in ("sparse", "dense_equal_flops")] == [3, 3]


@pytest.mark.parametrize(("options", "steps"), [
    ((), 6),  # 48 points in batches of 16, twice
    (("--trainer.accumulate_grad_batches", "2"), 4),
    (("--trainer.limit_train_batches", "2"), 4),
    (("--trainer.limit_train_batches", "0.4"), 2),
    (("--trainer.max_steps", "5"), 5),
    (("--data.class_path", "own_net.Streamed", "--trainer.max_steps", "5"), 5),
])  # fmt: skip
def test_the_steps_of_a_training_are_known_without_it(config, options, steps) -> None:
    experiment = Experiment(arguments(config, [], options))
    model, data = experiment.build("sparse")
    trainer = experiment.still(data)
    assert trainer.estimated_stepping_batches == steps
    model.module.configure_optimizers = lambda: model.module.trainer.max_epochs
    assert model.configure_optimizers(trainer) == 2
    assert trainer_of(model.module) is None


def test_code_that_has_changed_since_is_named(whole, config, capsys) -> None:
    sources = whole / "sources.json"
    assert list(json.loads(sources.read_text())) == ["own_net"]
    sources.write_text('{"own_net": "of other code"}')
    again = ["compare", str(config), "--output", str(whole), *FEW, "--learning_rates", "0.2"]
    assert main(again) == main(again) == 0
    assert capsys.readouterr().out.count("check: own_net has changed since this comparison began") == 2


def test_streams_are_compared_as_data_with_a_length_are(config, tmp_path) -> None:
    steps = {}
    for data in ("Points", "Streamed"):
        path = tmp_path / f"{data}.yaml"
        path.write_text(CONFIG.replace("Points", data) + SPARSIFY)
        asked = (str(path), "--output", str(tmp_path / data), *FEW, "--learning_rates", "0.2")
        assert main(["compare", *asked, "--baselines", "dense_equal_flops"]) == 0
        finals = json.loads((tmp_path / data / "results.json").read_text())["finals"]
        steps[data] = {name: (run["steps"], run["test_quality"]) for name, (run,) in finals.items()}
    assert {own[0] for own in steps["Points"].values()} == {3}  # 48 points in batches of 16
    assert steps["Points"] == steps["Streamed"]


def test_without_the_name_of_a_learning_rate_none_is_searched(config) -> None:
    path = config.parent / "unnamed.yaml"
    path.write_text(CONFIG.replace("own_net.Net", "own_net.Unnamed") + SPARSIFY)
    experiment = Experiment(arguments(path, [], ()))
    assert experiment.rate is None
    plan = Plan.make(experiment.plain(), CompareOptions(num_seeds=2), experiment.rate, seed=0)
    assert plan.search_units("sparse") == []
    assert [unit.name for unit in plan.final_units("sparse", None)] == ["sparse/final-seed0", "sparse/final-seed1"]
    rule = "no argument of the model is called lr or learning_rate; name it by sparsify.learning_rate"
    refused(rule, CompareOptions(learning_rates=(0.1, 0.2)).rates, experiment.rate)


def test_what_a_comparison_has_to_be_told_is_asked_for_in_one_line(config, tmp_path, capsys) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text(CONFIG)
    step = "sparsify.learning_rate='step_size' is no argument of the model that has a number"
    for code, path, words, rule in (
        (1, config, ("--sparsify.metric", "null"), "^--sparsify.metric is missing"),
        (1, config, ("--sparsify.metric", "val_accuracy"), "^validation logs no 'val_accuracy'; it logs "),
        (1, config, ("--sparsify.learning_rate", "step_size"), step),
        (1, config, ("--learning_rates", "0.2", "--model.answers_nan", "true"), "test_acc is nan, which compares with"),
        (2, config, ("--routers", "switch"), "^--routers switch: routers are compared in the suite's own models"),
        (2, bare, ("--seeds", "1"), "Net is no SparseModule.* needs the section sparsify"),
    ):
        own = ("compare", str(path), *FEW, "--output", str(tmp_path / words[-1]))
        assert re.search(rule, fails(capsys, code, *own, *words))
