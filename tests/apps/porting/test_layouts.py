"""Layouts of published tensors lead to our parameters and back."""

from __future__ import annotations

import torch
from published_models import NLLB, VOCAB, two_of_four

from apps.nets.transformer import TranslationModel
from apps.porting import (
    mixtral,
    nllb,
    switch,
    to_published,
)
from apps.porting.parts import cut, joined, stacked


def test_layouts_lead_there_and_back():
    q, k = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    part = joined("qk", ["q", "k"], [2, 1])
    assert part.join([q, k]).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert [t.tolist() for t in part.split(part.join([q, k]))] == [q.tolist(), k.tolist()]

    # Two experts of 2 inputs and 1 hidden unit: theirs (F, D), ours (E, D, F).
    part = stacked("w_in", ["a", "b"])
    assert part.join([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]).tolist() == [[[1], [2]], [[3], [4]]]
    assert part.split(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))[1].tolist() == [[3, 4]]

    # A wide FFN of 4 hidden units on 1 input as two experts of 2: w_in (4, 1) and w_out (1, 4).
    part = cut("w_in", "up", 2, dim=0)
    assert part.join([torch.tensor([[1.0], [2.0], [3.0], [4.0]])]).tolist() == [[[1, 2]], [[3, 4]]]
    part = cut("w_out", "down", 2, dim=1)
    ours = part.join([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
    assert ours.tolist() == [[[1], [2]], [[3], [4]]]
    assert part.split(ours)[0].tolist() == [[1, 2, 3, 4]]


def test_which_layers_have_experts():
    # Switch: index 1 modulo the step. NLLB: the last of each step.
    assert switch.sparse_layers(2, 6) == (1, 3, 5)
    assert switch.sparse_layers(3, 6) == (1, 4)
    assert switch.sparse_layers(1, 3) == (0, 1, 2)
    assert switch.sparse_layers(0, 6) == ()
    assert nllb.sparse_layers(4, 8) == (3, 7)
    assert nllb.sparse_layers(0, 8) == ()


def test_experts_held_in_two_tensors_are_taken_apart():
    # Gate and up, (E, 2F, D) with E = 2, F = 1, D = 1, and down, (E, D, F). Mixtral has no norm of queries.
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
        "model.layers.0.mlp.experts.down_proj": torch.tensor([[[5.0]], [[6.0]]]),
        "model.layers.0.mlp.gate.weight": torch.tensor([[7.0], [8.0]]),
    }
    block = "model.layers.0.block_sparse_moe"
    assert {name: tensor.flatten().tolist() for name, tensor in mixtral.published(fused).items()} == {
        f"{block}.experts.0.w1.weight": [1],
        f"{block}.experts.0.w3.weight": [2],
        f"{block}.experts.0.w2.weight": [5],
        f"{block}.experts.1.w1.weight": [3],
        f"{block}.experts.1.w3.weight": [4],
        f"{block}.experts.1.w2.weight": [6],
        f"{block}.gate.weight": [7, 8],
    }
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}
    names = {name.rpartition("experts.1.")[2] for name in mixtral.published(fused | norm) if "experts.1." in name}
    assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def test_masked_expert_outputs_of_nllb_are_made_up_for():
    # Theirs computes 0.8 of the sum in evaluation. Ours divides what is kept in training by 0.8: with gates of 0.8 that
    # is the plain sum of what is kept, as in their training.
    config, _ = to_published(TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()))
    assert config["moe_token_dropout"] == 0.0
    read = nllb.read({**config, "moe_token_dropout": 0.2}, {}).moe
    assert read is not None
    assert (read.router.scale, read.expert_output_masking) == (0.8, 0.2)
