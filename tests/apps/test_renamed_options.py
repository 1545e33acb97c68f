"""Options by their old names: in Python, in configurations, on command lines and in checkpoints, each with one line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from apps import registry
from apps.cli.configs import read_config
from apps.cli.options import Fit
from apps.plan.options import Options as Plan
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from core import fields


@pytest.fixture
def lines(caplog):
    """The log lines about old names."""
    registry.tell_renamed.cache_clear()
    fields.tell_renamed.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: sorted(r.getMessage() for r in caplog.records if "the old name works until" in r.getMessage())


def told(old: str, new: str) -> str:
    return f"{old} is now called {new}; the old name works until version 0.2"


def test_python_takes_an_old_keyword_with_one_line(lines):
    for _ in range(2):
        strategy = ExpertParallelStrategy(experts=2, rest="shard")
    assert (strategy.expert_parallel_size, strategy.non_experts) == (2, "shard")
    assert lines() == [told("experts", "expert_parallel_size"), told("rest", "non_experts")]
    with pytest.raises(ValueError, match="experts is the old name of expert_parallel_size: give"):
        ExpertParallelStrategy(experts=2, expert_parallel_size=2)


def test_a_configuration_is_read_with_new_names_with_one_line(tmp_path: Path, lines):
    strategy = {"class_path": "ExpertParallelStrategy", "init_args": {"shards": 2, "nodes": 1}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}, "model": {"experts": 1}}))
    for _ in range(2):
        config = read_config(tmp_path / "old.yaml")
    assert config["trainer"]["strategy"]["init_args"] == {"fsdp_size": 2, "nodes": 1}
    assert config["model"] == {"experts": 1}
    assert lines() == [told("strategy.shards", "strategy.fsdp_size")]


def test_a_command_line_takes_an_old_name_with_one_line(lines):
    flags = ["--trainer.strategy.hidden", "2", "--trainer.strategy.init_args.rest=shard", "--model.hidden", "3"]
    new = ("--trainer.strategy.expert_tensor_parallel_size", "2", "--trainer.strategy.init_args.non_experts=shard")
    assert Fit.read(flags).rest == (*new, "--model.hidden", "3")
    assert len(lines()) == 2


def test_a_command_takes_an_old_word_with_one_line(lines):
    words = ["--config", "configs/nlp/text_mixtral_like.yaml", "--gpus", "8", "--gpu", "h100"]
    assert Plan.read([*words, "--static_exchange"]).static_all_to_all
    assert lines() == [told("--static_exchange", "--static_all_to_all")]
