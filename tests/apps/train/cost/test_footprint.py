"""Bytes and seconds of a model, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from apps.train.cost import footprint
from apps.train.cost.footprint import Seconds, in_rounds, outside_median, peak_bytes, resident_bytes

CPU = torch.device("cpu")


def test_tensors_that_share_memory_are_resident_once():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5), nn.BatchNorm1d(4, affine=False))
    model[1].weight = model[0].weight
    # a matrix of 15, two biases of 5, means and variances of 4 in float32, and a count in int64
    assert resident_bytes(model) == 4 * (15 + 2 * 5 + 2 * 4) + 8


def test_the_peak_is_what_is_there_at_once(capfd):
    a = torch.ones(64, 64)  # 16 KiB

    def run():
        b = a.clone()
        c = b.clone()
        del b  # before the third one
        return c.clone()

    assert peak_bytes(run, CPU) == 2 * 64 * 64 * 4
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", range(1, 30))
def test_the_interval_of_a_median_has_95_percent_and_is_the_least_such(count):
    def outside(cut):
        return 2 * sum(math.comb(count, i) for i in range(cut + 1)) / 2**count

    cut = outside_median(count)
    assert cut == 0 or outside(cut) <= 0.05
    assert outside(cut + 1) > 0.05 or 2 * (cut + 1) >= count


def test_ratios_and_their_interval():
    seconds = Seconds(own=(2.0, 9.0, 3.0), trained=(4.0, 3.0, 3.0))
    assert seconds.ratios == [0.5, 3.0, 1.0]
    assert seconds.ratio == 1.0
    assert seconds.interval == (0.5, 3.0)  # of three values every one counts


def test_passes_take_turns_and_begin_in_turn(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(footprint.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(footprint, "ROUND_SECONDS", 3.0)

    def takes(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    seconds = in_rounds(takes("own", 2.0), takes("trained", 4.0), 3, CPU)
    # A pass of each, then turns of ceil(3 / 2) = 2 passes: one's, the other's; the other's, one's; ...
    own, trained = ["own"] * 2, ["trained"] * 2
    assert calls == ["own", "trained", *own, *trained, *trained, *own, *own, *trained]
    assert seconds == Seconds((2.0, 2.0, 2.0), (4.0, 4.0, 4.0))
