"""``moesaic doctor`` on runs of a small classifier: what it prints, its exit codes, and what a user may get wrong."""

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
from apps.doctor.command import begins_elsewhere

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


def test_a_healthy_run(runs, capsys):
    (line,) = doctor(capsys, 0, "--ckpt_path", runs / "healthy")
    assert line == f"healthy: 1 router on at most 8 validation batches of {runs}/healthy/checkpoints/best.ckpt"


def test_loads_that_the_data_decide_are_no_fault_in_the_log_either(runs, tmp_path, capsys):
    write_run(tmp_path, classifier(replace(MOE, router=core.Random(1))), DIGITS)
    shutil.copy(runs / "log" / "metrics.csv", tmp_path)
    (line,) = doctor(capsys, 0, "--ckpt_path", tmp_path)
    assert line.startswith(f"healthy: 2 rows of {tmp_path}/metrics.csv, 1 router on")


def test_equal_experts_and_the_score_without_each(runs, capsys):
    lines = doctor(capsys, 1, "--ckpt_path", runs / "same", "--batches", 2, "--ablate")
    assert lines[0].startswith(f"error: {LAYER}: same experts: 6 of 6 pairs of experts put out the same")
    assert "Remedy: start the experts apart" in lines[0]
    assert lines[1].startswith("1 finding: 1 router on at most 2 validation batches of ")
    assert lines[1].endswith("/same/checkpoints/best.ckpt")
    assert "what it loses without an expert" in lines[2]
    assert lines[3].startswith(f"{LAYER}: expert ")
    assert lines[3].count("expert ") == 4


def test_a_log_alone(runs, capsys):
    note, line = doctor(capsys, 1, "--ckpt_path", runs / "log")
    assert note == f"{runs}/log holds no checkpoint yet: metrics.csv alone was read"
    assert line.startswith(f"error: {LAYER}: collapsed load: the load's entropy is 10% of an even one's")
    assert doctor(capsys, 1, "--ckpt_path", runs / "log", "--batches", 0) == [line]


def test_a_run_without_its_configuration_has_its_log(runs, tmp_path, capsys):
    run = shutil.copytree(runs / "healthy", tmp_path / "run")
    (run / "config.yaml").unlink()
    error = fails(capsys, 1, "doctor", "--ckpt_path", str(run))
    assert error.startswith(f"no config.yaml lies beside {run}/checkpoints/best.ckpt")
    (run / "metrics.csv").write_text(LOG + "10,0.99,1.1\n")
    note, line = doctor(capsys, 0, "--ckpt_path", run)
    assert note == f"no config.yaml lies beside {run}/checkpoints/best.ckpt: metrics.csv alone was read"
    assert line == f"healthy: 1 row of {run}/metrics.csv"


@pytest.mark.parametrize("pretrained", [None, "w.pt"])
def test_movement_is_from_the_seed_s_weights_unless_a_run_began_with_others(runs, tmp_path, capsys, pretrained):
    config = yaml.safe_load((runs / "healthy" / "config.yaml").read_text()) | {"seed_everything": 3}
    (tmp_path / "seed.yaml").write_text(yaml.safe_dump(config))
    model = build_trial(runs / "healthy" / "checkpoints" / "best.ckpt", tmp_path / "seed.yaml", 1).model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(LAYER):
                p.add_(0.1)
    model.keep_arguments({"pretrained": pretrained})
    write_run(tmp_path / "run", model, DIGITS)
    config["model"]["init_args"]["pretrained"] = pretrained
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    lines = doctor(capsys, pretrained is None, "--ckpt_path", tmp_path / "run")
    moved = [line.split(": the ")[1].split(" since")[0] for line in lines if "since the start" in line]
    assert moved == ([] if pretrained else ["router has moved 0.0e+00", "experts have moved 0.0e+00"])


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
    def refused(code, *argv):
        capsys.readouterr()
        assert main(["doctor", *map(str, argv)]) == code
        # Before the error there may be a note that names the configuration.
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    assert refused(1, "--ckpt_path", tmp_path / "none") == f"no checkpoint {tmp_path}/none"
    (tmp_path / "half").mkdir()
    assert "holds no checkpoint" in refused(1, "--ckpt_path", tmp_path / "half")
    assert "it has no rows" in refused(1, "--ckpt_path", tmp_path / "half", "--batches", "0")
    dense = refused(1, "--ckpt_path", runs / "dense")
    assert dense.endswith("its VisionClassifier has no MoE layers, and so no routing to look at")
    cut = tmp_path / "cut"
    shutil.copytree(runs / "healthy", cut)
    file = cut / "checkpoints" / "best.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in refused(1, "--ckpt_path", cut)
    assert "--ablate scores the run" in refused(2, "--ckpt_path", cut, "--ablate", "--batches", "0")
    assert "seeds does not exist" in refused(2, "--ckpt_path", cut, "--seeds", "3")
    of_images = refused(1, "--ckpt_path", runs / "healthy", "--data", "new.csv")
    assert of_images == "data='new.csv' is for a model of columns, and VisionClassifier is none"
    assert "batches=-1" in refused(1, "--ckpt_path", cut, "--batches", "-1")
    other = Path(__file__).parents[3] / "configs" / "recsys" / "adult.yaml"
    error = refused(1, "--ckpt_path", runs / "healthy", "--config", other)
    assert "holds a model of class VisionClassifier, and this run's is of class MultiTaskRecommender" in error
