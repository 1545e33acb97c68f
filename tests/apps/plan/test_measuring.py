"""Figures of this machine, from work that takes half a second by the clock of these tests."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from commands import fails
from two_ranks import on_ranks

from apps.cli import main
from apps.plan import measuring
from apps.plan.measuring import measured_gpu

DIGITS = ("plan", "--config", "configs/vision/digits.yaml", "--gpus", "2", "--gpu", "measured")
BANDWIDTHS = ("--node_bandwidth", "4", "--network_bandwidth", "2")


def half_a_second(work, on):
    work()
    return 0.5


def measured_on_a_rank(rank: int) -> dict[str, float]:
    os.environ |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank)}
    with mock.patch.object(measuring, "_seconds", half_a_second):
        gpu = measured_gpu({"memory": 1e9, "half": 1e12})
    return {"within": gpu.within, "between": gpu.between, "single": gpu.single, "half": gpu.half}


def test_ranks_of_two_nodes_measure_both_bandwidths(tmp_path: Path) -> None:
    for figures in on_ranks(measured_on_a_rank, tmp_path, 4, ["apps.plan.measuring"]):
        # 2^20 numbers of 4 bytes for each of two ranks, of which one is another: 4 MiB in half a second.
        assert figures["within"] == figures["between"] == 2 * 4 * 2**20
        assert figures["single"] == 2 * 1024**3 / 0.5
        assert figures["half"] == 1e12  # given


def test_a_plan_takes_all_of_what_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(measuring, "_seconds", half_a_second)
    monkeypatch.setattr(measuring, "_memory", lambda device, local: 16e9 / local)
    assert main([*DIGITS, *BANDWIDTHS]) == 0
    # 2 x 1024^3 FLOPs in half a second are 4.29 GFLOP/s.
    assert ": 16 GB, 4 and 2 GB/s within and between nodes of 8, 100% of 0.00429 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (BANDWIDTHS[2:], "the bandwidth within a node is measured among several processes"),
        (BANDWIDTHS[:2], "the bandwidth between nodes is measured among several of them"),
    ],
)
def test_one_process_measures_no_bandwidth(capsys, given, missing):
    line = fails(capsys, 2, *DIGITS, *given)
    assert line.startswith(f"{missing}: start moesaic plan by torchrun")


def test_another_rank_prints_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main([*DIGITS[:-1], "h100"]) == 0
    assert capsys.readouterr().out == ""
