"""What a log alone says: columns as a training writes them, with the value that names each fault."""

from __future__ import annotations

import pytest

from apps.doctor.command import log_findings, series

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


def test_an_expert_that_was_idle_once_is_not_dead():
    assert log_findings(rows(count=2) + rows(count=1, dead_experts=1.0)) == []


def test_the_validation_stands_in_for_the_training():
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
