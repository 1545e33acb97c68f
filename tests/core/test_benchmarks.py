"""The benchmark of the layer: what others install must not take the table down."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import layer


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("forward() takes no such thing\nand more")


def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(layer, "peer_layers", lambda *_: {"peer": Broken()})
    shape, cpu = layer.Shape(8, 8, 2, 1, 8), torch.device("cpu")
    rows = layer.measure(shape, torch.float32, ["auto"], 1, True, False, cpu, (1.0, 1.0))
    assert [row["system"] for row in rows] == ["dense", "moesaic auto"]
    for error in (ImportError("not installed"), ValueError("hidden_size=8 is too small")):
        with layer.or_said("another"):
            raise error
    assert capsys.readouterr().out.splitlines() == [
        "peer does not run in torch.float32: TypeError: forward() takes no such thing",
        "another is not built: ValueError: hidden_size=8 is too small",
    ]
