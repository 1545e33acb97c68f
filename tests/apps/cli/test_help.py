"""``--help_all``, ``--model.help`` and ``--print_config``: what can be set, and what is in force."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_app import TinyData, TinyModule

import core
from apps.cli import main
from apps.cli.classes import app_classes, long_name
from apps.cli.help import options_of
from apps.train.optim.optimizers import OptimizerConfig

pytestmark = pytest.mark.usefixtures("config")


def lines_of(*argv: str) -> list[str]:
    """Return the lines of stdout of a command that must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(argv)) == 0
    return out.getvalue().splitlines()


# ---- short names


@pytest.mark.parametrize(
    ("option", "name"),
    [("--model.help", name) for name in app_classes("model")] + [("--data.help", name) for name in app_classes("data")],
)
def test_a_short_name_is_taken_by_help(option, name):
    title, *lines = lines_of("fit", option, name)
    part = option[2:].partition(".")[0]
    assert title.startswith(f"{part} {long_name(part, name)}: ")
    assert len(lines) > 5
    assert all(line.startswith(f"  --{part}.") for line in lines if line)


# ---- help


def test_all_options_are_a_line_each_by_section(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # narrower, a meaning is cut
    lines = lines_of("fit", "--help_all", "--config", "tiny.yaml")
    titles = [line.partition(":")[0] for line in lines if line and not line.startswith("  --")]
    assert titles == ["run", "trainer", "model tiny_app.TinyModule", "data tiny_app.TinyData"]
    text = "\n".join(lines)
    for noise in ("known subclasses", "{fit}", "usage:", "type: "):
        assert noise not in text
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(names) == len(set(names))
    rows = {line.split()[0]: re.split("  +", line.strip())[1:] for line in lines if line.startswith("  --")}
    assert rows["--model.moe.router.top_k"] == ["2 (at least 1)", "experts per token, K"]
    assert rows["--model.moe.router.score_func"][0] == "softmax (softmax, sigmoid, sqrt_softplus)"
    assert rows["--model.optimizer.lr"] == ["0.001 (above 0)", "peak learning rate"]
    assert rows["--model.dropout"] == ["0.1", "probability"]
    assert rows["--trainer.enable_model_summary"][0] == "false"  # as our command line sets it
    assert "--model.num_classes" not in rows  # the data decide it
    alone = lines_of("fit", "--help_all", "data", "--config", "tiny.yaml")
    assert [line.split() for line in alone] == [line.split() for line in lines[-len(alone) :]]


def test_without_a_configuration_the_classes_are_listed():
    lines = lines_of("test", "--help_all", "model")  # and no checkpoint is asked for
    assert lines[0] == "model"
    assert [line.split()[1] for line in lines[1:-2]] == list(app_classes("model"))


def test_a_router_has_help_by_its_short_name():
    title, *lines = lines_of("fit", "--model.moe.router.help", "Hash")
    assert title.startswith("model.moe.router core.routing.given.fixed.Hash: ")
    assert lines[0].split()[:2] == ["--model.moe.router.vocab_size", "required"]


@pytest.mark.parametrize(
    ("option", "name", "argument"),
    [
        ("trainer.callbacks", "EarlyStopping", "patience"),
        ("trainer.strategy", "ExpertParallelStrategy", "expert_parallel_size"),
        ("optimizer", "SGD", "momentum"),
    ],
)
def test_a_part_of_the_trainer_has_help_by_its_name(option, name, argument):
    title, *lines = lines_of("fit", f"--{option}.help", name)
    assert title.startswith(f"{option} ")
    assert f"--{option}.{argument}" in [line.split()[0] for line in lines if line]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.callbacks.help"], "trainer.callbacks.help needs the name of a class"),
        (["--help_all", "modl"], "help_all=modl does not exist; did you mean 'model'?"),
        (["--model.help", "VisionClasifier"], "VisionClasifier does not exist; did you mean 'VisionClassifier'?"),
    ],
)
def test_help_of_what_is_not_there(capsys, argv, message):
    assert main(["fit", *argv]) == 2
    assert message in capsys.readouterr().err


def test_options_of_a_config_are_listed_with_the_values_of_its_owner():
    options = {o.name: o.default for o in options_of(TinyModule, "m", {"moe": core.MoEConfig(6, core.Hash(9))})}
    assert options["m.moe.num_experts"] == "6 (at least 1)"
    assert (options["m.moe.router"], options["m.moe.router.vocab_size"]) == ("Hash", "9 (at least 1)")
    assert {o.name for o in options_of(TinyData, "d")} == {"d.num_classes", "d.n", "d.batch_size", "d.num_workers"}


# ---- the configuration in force


def printed(*argv: str) -> dict[str, Any]:
    return yaml.safe_load("\n".join(lines_of("fit", *argv, "--print_config")))


def test_the_printed_configuration_has_the_defaults_in_force():
    own = yaml.safe_load("\n".join(lines_of("test", "--config", "tiny.yaml", "--print_config")))  # without a checkpoint
    assert own["data"]["init_args"]["n"] == 24
    model = printed("--config", "tiny.yaml")["model"]["init_args"]
    assert OptimizerConfig(**model["optimizer"]) == OptimizerConfig()
    assert model["explode_at"] is model["ema_decay"] is None  # where null is "off" it stays
    assert (
        printed("--config", "tiny.yaml", "--model.optimizer.lr", "0.5")["model"]["init_args"]["optimizer"]["lr"] == 0.5
    )
    null = ["--config", "tiny.yaml", "--config", "null.yaml"]
    Path("null.yaml").write_text("model: {init_args: {optimizer: null, moe: null}}")
    model = printed(*null)["model"]["init_args"]
    assert model["optimizer"]["lr"] == OptimizerConfig().lr
    assert model["moe"] is None


@pytest.mark.parametrize(
    ("name", "filled"),
    [
        ("recsys/synthetic.yaml", ["embedding", "dense", "interaction", "weighting"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("vision/digits.yaml", ["optimizer"]),
                ("recsys/movielens_1m_next_item.yaml", ["sequence", "optimizer"]),
                ("nlp/multi30k_en_de.yaml", ["transformer", "optimizer"]),
            )
        ),
    ],
)
def test_no_null_of_an_app_stands_for_a_default(name, filled):
    path, empty = f"configs/{name}", "\n".join(f"    {option}: null" for option in filled)
    Path("null.yaml").write_text(f"model:\n  init_args:\n{empty}\n")
    values = printed("--config", path, "--config", "null.yaml")
    assert all(isinstance(values["model"]["init_args"][option], dict) for option in filled)
    Path("again.yaml").write_text(yaml.safe_dump(values))
    assert printed("--config", "again.yaml") == values


def test_a_published_transformer_is_not_written_out_as_ours():
    flags = ["--model", "Translator", "--data", "TranslationData", "--model.pretrained", "folder"]
    assert printed(*flags)["model"]["init_args"]["transformer"] is None
    assert printed(*flags[:4])["model"]["init_args"]["transformer"]["size"] == "tiny"


def test_a_class_given_by_a_flag_begins_without_the_stand_in_s_arguments():
    """SharedBottom, which stands in for null, has experts of width 128; MMoE's own are of width 16."""
    flags = ["--model", "MultiTaskRecommender", "--data", "TableData", "--model.shared", "core.MMoE"]
    shared = printed(*flags, "--model.shared.num_experts", "2")["model"]["init_args"]["shared"]
    assert shared["init_args"]["expert"]["init_args"]["hidden_dims"] == list(core.MMoE(2).expert.hidden_dims) == [16]
    shared = printed(*flags[:4], "--model.shared.expert.hidden_dims", "[32]")["model"]["init_args"]["shared"]
    assert shared["class_path"] == "apps.recsys.tables.columns.bottoms.SharedBottom"
    assert shared["init_args"]["expert"]["init_args"]["hidden_dims"] == [32]


def losses(run: str) -> list[str]:
    with open(Path("runs", run, "metrics.csv")) as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


def test_printed_and_written_configurations_give_the_same_run(run):
    Path("runs").mkdir()
    run.rename("runs/tiny")
    Path("printed.yaml").write_text("\n".join(lines_of("fit", "--config", "tiny.yaml", "--print_config")))
    for config, run in (("printed.yaml", "printed"), ("runs/tiny/config.yaml", "again")):
        assert main(["fit", "--config", config, "--run_dir", f"runs/{run}"]) == 0
    assert len([x for x in losses("tiny") if x]) == 3  # 24 points in batches of 8
    assert losses("printed") == losses("again") == losses("tiny")
    written = [yaml.safe_load(Path("runs", run, "config.yaml").read_text()) for run in ("tiny", "printed", "again")]
    assert len({yaml.safe_dump({**one, "run_dir": ""}) for one in written}) == 1
