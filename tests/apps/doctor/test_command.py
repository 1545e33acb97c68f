"""``moesaic doctor`` on runs of a small classifier and on logs: findings, exit codes, and what a user may get wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import fails
from converted import DIGITS, MOE, classifier, write_run

import core
from apps.cli import main
from apps.cli.trial import build_trial
from apps.doctor.command import begins_elsewhere, log_findings, series

LOG = "step,val/routing/model.blocks.1.mlp/load_entropy,val/routing/model.blocks.1.mlp/load_imbalance\n"
LAYER = "model.blocks.1.mlp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs without training: ``healthy``, ``same`` with equal experts, ``dense``, and ``log`` with a log alone."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "healthy", classifier(MOE), DIGITS)
    same = classifier(MOE)
    with torch.no_grad():
        for p in same.model.blocks[1].mlp.experts.parameters():
            p.copy_(p[:1].expand_as(p))
    write_run(folder / "same", same, DIGITS)
    write_run(folder / "dense", classifier(None), DIGITS)
    (folder / "log").mkdir()
    (folder / "log" / "metrics.csv").write_text(LOG + "10,0.99,1.1\n20,0.1,3.9\n")
    return folder


def doctor(capsys, code, *argv):
    capsys.readouterr()
    assert main(["doctor", *map(str, argv)]) == code
    return capsys.readouterr().out.splitlines()


def test_loads_that_the_data_decide_are_no_fault_in_the_log_either(runs, tmp_path, capsys):
    write_run(tmp_path, classifier(replace(MOE, router=core.Random(1))), DIGITS)
    shutil.copy(runs / "log" / "metrics.csv", tmp_path)
    (line,) = doctor(capsys, 0, "--ckpt_path", tmp_path)
    assert line.startswith(f"healthy: 2 rows of {tmp_path}/metrics.csv, 1 router on")


def test_equal_experts_and_the_score_without_each(runs, capsys):
    finding, count, title, ablated = doctor(capsys, 1, "--ckpt_path", runs / "same", "--batches", 2, "--ablate")
    assert finding.startswith(f"error: {LAYER}: same experts: 6 of 6 pairs of experts put out the same")
    assert "Remedy: start the experts apart" in finding
    checkpoint = f"{runs}/same/checkpoints/best.ckpt"
    assert count == f"1 finding: 1 router on at most 2 validation batches of {checkpoint}"
    assert "what it loses without an expert" in title
    assert ablated.startswith(f"{LAYER}: expert ")
    assert ablated.count("expert ") == 4


def test_a_log_alone_or_that_of_a_run_without_its_configuration(runs, capsys, tmp_path):
    note, line = doctor(capsys, 1, "--ckpt_path", runs / "log")
    assert note == f"{runs}/log holds no checkpoint yet: metrics.csv alone was read"
    assert line.startswith(f"error: {LAYER}: collapsed load: the load's entropy is 10% of an even one's")
    assert doctor(capsys, 1, "--ckpt_path", runs / "log", "--batches", 0) == [line]
    run = shutil.copytree(runs / "healthy", tmp_path / "run")
    (run / "config.yaml").unlink()
    error = fails(capsys, 1, "doctor", "--ckpt_path", str(run))
    assert error.startswith(f"no config.yaml lies beside {run}/checkpoints/best.ckpt")
    (run / "metrics.csv").write_text(LOG + "10,0.99,1.1\n")
    note, line = doctor(capsys, 0, "--ckpt_path", run)
    assert note == f"no config.yaml lies beside {run}/checkpoints/best.ckpt: metrics.csv alone was read"
    assert line == f"healthy: 1 row of {run}/metrics.csv"


def test_movement_is_from_the_seed_s_weights_unless_a_run_began_with_others(runs, tmp_path, capsys):
    config = yaml.safe_load((runs / "healthy" / "config.yaml").read_text()) | {"seed_everything": 3}
    (tmp_path / "seed.yaml").write_text(yaml.safe_dump(config))
    model = build_trial(runs / "healthy" / "checkpoints" / "best.ckpt", tmp_path / "seed.yaml", 1).model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(LAYER):
                p.add_(0.1)
    for pretrained, expected in (
        (None, ["router has moved 0.0e+00", "experts have moved 0.0e+00"]),
        ("w.pt", []),
    ):
        model.keep_arguments({"pretrained": pretrained})
        write_run(tmp_path / "run", model, DIGITS)
        config["model"]["init_args"]["pretrained"] = pretrained
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        lines = doctor(capsys, pretrained is None, "--ckpt_path", tmp_path / "run", "--batches", 1)
        moved = [line.split(": the ")[1].split(" since")[0] for line in lines if "since the start" in line]
        assert moved == expected
    assert lines == [f"healthy: 1 router on at most 1 validation batches of {tmp_path}/run/checkpoints/best.ckpt"]


@pytest.mark.parametrize(
    "arguments, elsewhere",
    [
        ({"pretrained": None, "grow": None, "copy": True, "distil": {"teacher": "a", "copy": False}}, False),
        ({"distil": {"teacher": "a", "copy": True}}, True),
        ({"encoder_from": "a.ckpt"}, True),
        ({"grow": {"from": "a"}}, True),
        ({"tower": {"class_path": "TwoTowers", "init_args": {"text": {"init_args": {"pretrained": "minilm"}}}}}, True),
    ],
)
def test_arguments_that_name_a_start(arguments, elsewhere):
    assert begins_elsewhere(arguments) == elsewhere


def test_bad_input(runs, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    cut = shutil.copytree(runs / "healthy", tmp_path / "cut")
    file = cut / "checkpoints" / "best.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    other = Path(__file__).parents[3] / "configs" / "recsys" / "adult.yaml"
    for code, run, words, line in (
        (1, tmp_path / "none", (), f"no checkpoint {tmp_path}/none"),
        (1, tmp_path / "half", (), "holds no checkpoint"),
        (1, tmp_path / "half", ("--batches", "0"), "it has no rows"),
        (1, runs / "dense", (), "its VisionClassifier has no MoE layers, and so no routing to look at"),
        (1, cut, (), str(file)),
        (2, cut, ("--ablate", "--batches", "0"), "--ablate scores the run"),
        (2, cut, ("--seeds", "3"), "seeds does not exist"),
        (1, cut, ("--batches", "-1"), "batches=-1"),
        (1, runs / "healthy", ("--data", "new.csv"),
         "data='new.csv' is for a model of columns, and VisionClassifier is none"),
        (1, runs / "healthy", ("--config", str(other)),
         "holds a model of class VisionClassifier, and this run's is of class MultiTaskRecommender"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["doctor", "--ckpt_path", str(run), *words]) == code
        # Before the error there may be a note that names the configuration.
        assert line in capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


# ---- what a log alone says: columns as a training writes them, with the value that names each fault


HEALTHY = {"load_imbalance": 1.3, "load_entropy": 0.98, "drop_rate": 0.02, "dead_experts": 0.0}


def rows(layer="blocks.1.mlp", count=3, **values):
    figures = {f"val/routing/{layer}/{name}": str(v) for name, v in {**HEALTHY, **values}.items()}
    return [{"step": str(i), "train/loss": "", **figures} for i in range(count)]


def names(findings):
    return [(finding.name, finding.layer) for finding in findings]


@pytest.mark.parametrize(
    "values, name",
    [
        ({}, None),
        ({"load_entropy": 0.3, "load_imbalance": 6.0}, "collapsed_load"),
        ({"dead_experts": 2.0}, "dead_experts"),
        ({"drop_rate": 0.4}, "drops"),
    ],
)
def test_the_last_validation_says(values, name):
    assert names(log_findings(rows(**values))) == ([] if name is None else [(name, "blocks.1.mlp")])


def test_an_expert_that_was_idle_once_is_not_dead_and_the_validation_stands_in_for_the_training():
    assert log_findings(rows(count=2) + rows(count=1, dead_experts=1.0)) == []
    of_training = [{"routing/layer/load_entropy": "0.1", "routing/layer/load_imbalance": "8"}]
    assert names(log_findings(of_training)) == [("collapsed_load", "layer")]
    assert log_findings(of_training + rows("layer")) == []


def test_a_dense_gate_may_prefer_experts_and_not_one_alone():
    # 0.95 and 0.05 have 0.29 of the entropy of two even ones; half of it is the bound.
    assert log_findings(rows("shared.task0", load_entropy=0.3, load_imbalance=5.0)) == []
    assert names(log_findings(rows("shared.task0", load_entropy=0.1))) == [("polarized_gates", "shared.task0")]


@pytest.mark.parametrize(
    "last, name", [(9.0, None), (900.0, "logits_drift"), (4900.0, "logits_overflow"), (float("nan"), "logits_overflow")]
)
@pytest.mark.parametrize("first", ["router_z_loss", "router_z"])  # the old name, and a run that went on with the new
def test_the_level_of_the_logits(last, name, first):
    # router_z_loss is the mean square of logsumexp: 3 at the start of each, and 3, 30 or 70 at the end.
    log = [{f"train/{first}": "9.0"}] * 6 + [{f"train/{first}": ""}] + [{"train/router_z_loss": str(last)}] * 3
    assert names(log_findings(log)) == ([] if name is None else [(name, "")])


def test_empty_cells_are_no_values():
    assert series([{"a": "1"}, {"a": ""}, {}, {"a": None}, {"a": "2.5"}], "a") == [1.0, 2.5]
