"""Bytes and seconds of a model, by hand, and experts that are offloaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import core
from apps.train.cost import footprint
from apps.train.cost.footprint import Seconds, in_rounds, outside_median, peak_bytes, resident_bytes
from apps.train.cost.offloading import Budget, described, offload, read_budget, record

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


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget(0.5, True)),
        ("1", Budget(1.0, True)),
        ("4096", Budget(4096.0, False)),
        ("1B", Budget(1.0, False)),
        ("64MB", Budget(64e6, False)),
        ("64MiB", Budget(64 * 2.0**20, False)),
        ("1.5gib", Budget(1.5 * 2**30, False)),
        ("0.25:a:b.safetensors", Budget(0.25, True, Path("a:b.safetensors"))),
    ],
)
def test_a_share_or_a_size_and_a_file(text: str, budget: Budget):
    assert read_budget(text) == budget


@pytest.mark.parametrize("text", ["2.5", "half", "-1", "64 m", "1e3", "50%", ""])
def test_another_text_is_refused(text: str):
    with pytest.raises(ValueError, match=f"offload={text} is no share of the experts up to 1"):
        read_budget(text)
    with pytest.raises(ValueError, match="offload=0MB leaves no expert on the device"):
        read_budget("0MB")


def test_what_is_said_of_an_offloaded_model():
    layer = core.MoEConfig(4, core.TokenChoice(4), core.FFN(8)).build(8).eval().requires_grad_(False)
    offloaded = offload(layer, "0.5")
    assert "2 of 4 experts in slots of 1,024 bytes: no expert needed" in described(offloaded)
    assert record("0.5", offloaded)["hit_rate"] is None
    layer(torch.randn(1, 1, 8))
    # Every expert is needed and none is there: 4 experts of 2 matrices of 8 x 8 numbers.
    values = record("0.5", offloaded)
    assert (values["hit_rate"], values["bytes_moved"], values["slots"]) == (0.0, 4 * 512, 2)
    assert "hit rate 0.000" in described(offloaded)
