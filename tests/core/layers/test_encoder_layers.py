"""MoE layers in ``nn.TransformerEncoderLayer``, whose fused path in evaluation knows no other feed-forward block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from core import CGC, FFN, MLP, MoEConfig, TokenChoice, record


class Block(nn.TransformerEncoderLayer):
    """An encoder layer with an MoE layer in place of its feed-forward block."""

    def __init__(self) -> None:
        super().__init__(8, 2, 16, dropout=0.0, batch_first=True)
        self.moe = MoEConfig(4, TokenChoice(2), FFN(8)).build(8)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.moe(x)


def test_the_moe_layer_of_an_encoder_layer_runs_in_evaluation():
    block, x = Block(), torch.randn(2, 5, 8)
    with record(block) as tape:
        expected = block(x)
    assert [entry.name for entry in tape.entries] == ["moe"]
    block.eval()
    for other in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad(), record(other) as tape:
            torch.testing.assert_close(other(x), expected)
        assert len(tape) == 1
        assert tape.silent_layers() == ()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_packs_padding_is_refused_in_one_line():
    encoder = nn.TransformerEncoder(Block(), 1).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    message = "^x is a nested tensor: give nn.TransformerEncoder enable_nested_tensor=False$"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        encoder(torch.randn(2, 5, 8), src_key_padding_mask=padding)


def test_a_tape_names_the_layers_that_did_not_run():
    config = MoEConfig(4, TokenChoice(2), FFN(8))
    model = nn.ModuleDict({"a": config.build(8), "ab": config.build(8), "tasks": CGC(2, MLP((8,)), 1).build(8, 2)})
    with record(model) as tape:
        assert tape.silent_layers() == ("a", "ab", "tasks")
        model["ab"](torch.randn(1, 3, 8))
        assert tape.silent_layers() == ("a", "tasks")
        model["tasks"](torch.randn(3, 8))  # whose passes are "tasks.task0" and "tasks.task1"
    with record(model) as other:
        model["a"](torch.randn(1, 3, 8))
    assert tape.detach().silent_layers() == tape.loads().silent_layers() == ("a",)
    assert other.silent_layers() == ("ab", "tasks")
    assert tape.merge(other).silent_layers() == ()
    with record(model["a"]) as alone:
        model["a"](torch.randn(1, 3, 8))
    assert alone.layers == ("",)
    assert alone.silent_layers() == ()
