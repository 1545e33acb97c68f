"""The texts of ``--offload``, and what is said of a model afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import core
from apps.train.cost.offloading import Budget, described, offload, read_budget, record


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


def test_nothing_on_the_device_is_refused():
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
