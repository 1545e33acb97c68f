"""Who computes a token, from routings that are written down."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import core
from apps.report.exhibit import Pieces
from apps.report.page import Words
from apps.report.routed import (
    expert_label_counts,
    expert_of_token,
    experts_by_layer,
    experts_of_token,
    gate_weights,
    gates_by_layer,
    layer_label,
    layer_names,
    words_by_layer,
)


def routing(token, expert, gate, num_tokens, num_experts):
    """Expert ``num_experts`` computes none."""
    ids = torch.tensor(expert)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    return core.Routing(torch.tensor(token), ids, torch.tensor(gate), counts, counts, num_tokens)


# Token 0: experts 2 (0.6) and 0 (0.4). Token 1: its better choice was dropped, expert 1 is left. Token 2: both dropped.
# Token 3: equal gates, the lower expert first. Token 4 has no pair, as under expert choice.
PAIRS = routing([0, 0, 1, 1, 2, 2, 3, 3], [2, 0, 3, 1, 3, 3, 2, 1], [0.4, 0.6, 0.0, 0.3, 0.0, 0.0, 0.5, 0.5], 5, 3)


def test_experts_of_a_token_come_by_falling_gate_and_one_without_has_none_on_a_page():
    assert expert_of_token(PAIRS).tolist() == [0, 1, -1, 1, -1]
    assert experts_of_token(PAIRS, 2).tolist() == [[0, 2], [1, -1], [-1, -1], [1, 2], [-1, -1]]
    assert experts_of_token(PAIRS, 3)[0].tolist() == [0, 2, -1]
    # The order of the pairs does not matter: an expert-choice router lists them by expert.
    by_expert = routing([1, 3, 3, 0, 0, 1], [1, 1, 2, 0, 2, 3], [0.3, 0.5, 0.5, 0.6, 0.4, 0.0], 5, 3)
    assert torch.equal(experts_of_token(by_expert, 2), experts_of_token(PAIRS, 2))
    entries = [SimpleNamespace(name=f"decoder.layers.{i}.ffn", routing=PAIRS) for i in (0, 1)]
    words = Words.of_pieces("A text", list("abcde"), experts_by_layer(entries), 8)
    assert words.labels == dict.fromkeys(("decoder 0", "decoder 1"), ("0 2", "1", "", "1 2", ""))


def test_without_pairs_the_experts_of_a_token_are_those_of_the_largest_shares():
    # Two sequences of two tokens, the last token is padding.
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    tokens = torch.tensor([3, 3, 3])
    merged = core.contract.MergeRouting(weights, 2, 1, tokens, 4, valid_T=torch.tensor([True, True, True, False]))
    assert expert_of_token(merged).tolist() == [1, 1, 0, -1]
    assert experts_of_token(merged, 4).tolist() == [[1, 2, 0, -1], [1, 2, 0, -1], [0, 1, 2, -1], [-1, -1, -1, -1]]
    torch.testing.assert_close(gate_weights(merged), weights[[0, 0, 1, 1]])
    assert expert_label_counts(merged, torch.tensor([0, 1, 1, 1]), 2).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_counts_by_label_and_gate_weights_leave_dropped_pairs_out():
    # Token 0 has label 1 and experts 2 and 0, token 1 label 0 and expert 1, token 3 label 1 and experts 2 and 1.
    assert expert_label_counts(PAIRS, torch.tensor([1, 0, 0, 1, 1]), 2).tolist() == [[0, 1, 0], [1, 1, 2]]
    # Labels 1 and 0 of two whole sequences of two tokens. Expert 2 is none. Tokens 0 and 1 are the first sequence's.
    r = routing([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 2, 1, 2, 1, 0], [0.5] * 8, 4, 2)
    assert expert_label_counts(r, torch.tensor([1, 0]), 3).tolist() == [[1, 2], [2, 1], [0, 0]]
    # Token 0 takes expert 1 with 0.7 and expert 0 with 0.3; token 1 expert 1 with 0.6, its second pair is not computed.
    pairs = routing([0, 0, 1, 1], [1, 0, 1, 2], [0.7, 0.3, 0.6, 0.4], 2, 2)
    torch.testing.assert_close(gate_weights(pairs), torch.tensor([[0.3, 0.7], [0.0, 0.6]]))


def test_gates_of_a_layer_stand_together_and_leave_out_experts_that_they_do_not_reach():
    given = [("a", "click", ("0", "1"), np.array([0.3, 0.7])), ("a", "like", ("1", "own"), np.array([0.4, 0.6]))]
    layers = gates_by_layer([*given, ("b", "click", ("0",), np.array([1.0]))], "Gates")
    assert list(layers) == ["a", "b"]
    (gates,) = layers["a"]
    assert (gates.gates, gates.experts) == (("click", "like"), ("0", "1", "own"))
    np.testing.assert_array_equal(gates.weights, [[0.3, 0.7, np.nan], [np.nan, 0.4, 0.6]])


def test_layers_are_named_by_their_place_and_names_differ():
    labels = {
        "blocks.3.mlp": "block 3",
        "model.stages.2.blocks.1.mlp": "block 2.1",
        "model.blocks.2.blocks.0.1.mlp": "block 2.0.1",
        "model.groups.1.ffn.mlp": "group 1",
        "model.blocks.11.mlp": "block 11",
        "model.blocks.11.depth_gate": "block 11 depth gate",
        "model.decoder.layers.3.mixing.heads": "decoder 3 attention",
        "decoder.layers.1.depth_gate": "decoder 1 depth gate",
        "model.decoder.layers.3.ffn": "decoder 3",
        "encoder.layers.0.ffn": "encoder 0",
        "encoder.ffn": "encoder.ffn",
        "model.layers.1.mlp": "layers.1.mlp",  # a user's model may have several there
        "model.towers.stack.layers.1.ffn": "block 1",
        "model.towers.image_tower.blocks.3.mlp": "image block 3",
        "model.towers.text.layers.0.ffn": "text block 0",
        "item_tower.blocks.1.ffn": "item block 1",
        "model.head.experts.task0": "head.experts.task0",
    }
    assert {name: layer_label(name) for name in labels} == labels
    names = ["m.blocks.0.mixing", "m.blocks.0.ffn", "m.blocks.1.ffn", "m.blocks.1.ffn", "decoder.layers.2.ffn", "odd"]
    words = ["block 0 mixing", "block 0 ffn", "block 1", "block 1, pass 2", "decoder 2", "odd"]
    assert layer_names(names) == words


def test_words_have_the_experts_of_the_largest_logits():
    torch.manual_seed(0)
    configs = {name: core.MoEConfig(4, core.TokenChoice(k), core.FFN(8)) for name, k in (("long", 3), ("short", 1))}
    model = torch.nn.ModuleDict({name: config.build(6) for name, config in configs.items()}).eval()
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
    with pytest.raises(ValueError, match="'A text' has 2 tokens, and experts of 1"):
        Pieces("A text", (("a", "b"),), np.zeros((1, 1), int), ("0",))
