"""The experts of words, and the names of layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import core
from apps.report.exhibit import Pieces
from apps.report.routed import layer_names, words_by_layer


def test_names_of_layers_differ():
    names = ["m.blocks.0.mixing", "m.blocks.0.ffn", "m.blocks.1.ffn", "m.blocks.1.ffn", "decoder.layers.2.ffn", "odd"]
    words = ["block 0 mixing", "block 0 ffn", "block 1", "block 1, pass 2", "decoder 2", "odd"]
    assert layer_names(names) == words


def test_words_have_the_experts_of_the_largest_logits():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "long": core.MoEConfig(4, core.TokenChoice(top_k=3), core.FFN(hidden_dim=8)).build(6),
            "short": core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(hidden_dim=8)).build(6),
        }
    ).eval()
    x_1SD = torch.randn(1, 3, 6)
    with core.record(model) as tape:
        model["long"](x_1SD)
        model["short"](x_1SD[:, :2])
    layers = words_by_layer(tape.entries, [("a", "b"), ("c",)], "A text")
    assert list(layers) == ["long"]  # two tokens have no places among three pieces
    (words,) = layers["long"]
    logits = tape.entries[0].routing.evidence.logits_TE
    by_hand = [sorted(range(4), key=lambda e, row=row: -row[e])[:2] for row in logits.tolist()]
    assert words.experts.tolist() == by_hand
    assert words.names == ("0", "1", "2", "3")


def test_words_and_experts_are_as_many():
    with pytest.raises(ValueError, match="'A text' has 2 tokens, and experts of 1"):
        Pieces("A text", (("a", "b"),), np.zeros((1, 1), int), ("0",))
