"""The words of a command line."""

from __future__ import annotations

import compared

from apps.cli.flags import with_classes_and_nulls
from apps.cli.train import build


def test_null_reaches_any_depth():
    config = {"model": {"class_path": "V", "init_args": {"moe": {"capacity_factor": 1.0, "router": "TokenChoice"}}}}
    argv = ["--trainer.logger", "false", "--model.moe.capacity_factor", "null", "--model.moe=null", "--print_config"]
    merged, rest = with_classes_and_nulls(config, argv)
    assert merged["model"]["init_args"]["moe"] == {"capacity_factor": None, "router": "TokenChoice"}
    assert rest == ["--trainer.logger", "false", "--model.moe=null", "--print_config"]
    # Where there is nothing to set it in, the flag stays, to be refused by name.
    for flag in ("--model.mo.capacity_factor=null", "--model.init_args.moe.router.mood=~"):
        assert with_classes_and_nulls(config, [flag]) == (config, [flag])
    deep = with_classes_and_nulls(config, ["--model.init_args.moe.capacity_factor=~"])
    assert deep == (merged, [])


def test_a_nested_null_is_taken(config):
    flags = ["--model.moe.capacity_factor", "1.5", "--model.moe.eval_capacity_factor", "null"]
    moe = build("fit", ["--config", config, *flags]).model.hparams["moe"]
    assert (moe["capacity_factor"], moe["eval_capacity_factor"]) == (1.5, None)


def test_a_null_of_a_class_that_an_earlier_flag_names_is_taken(tmp_path):
    (tmp_path / "no_router.yaml").write_text(compared.CONFIG)
    flags = ["--model.moe.router", "core.TokenChoice", "--model.moe.router.noise", "null"]
    model = build("fit", ["--config", str(tmp_path / "no_router.yaml"), *flags]).model
    assert model.hparams["moe"]["router"]["init_args"]["noise"] is None
