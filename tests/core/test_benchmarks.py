"""The benchmarks of layers: what others install must not take a table down, and what is compared is equal."""

from __future__ import annotations

import argparse
import copy
import json

import pytest
import torch
from torch import nn

import core
from benchmarks import experts, fewer_experts, layer, lora_experts, peer


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("forward() takes no such thing\nand more")


@pytest.mark.parametrize("served_badly, others", [(False, []), (True, ["dense, torch.nn.Linear"])])
def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch, capsys, served_badly, others):
    monkeypatch.setattr(layer, "peer_layers", lambda *_: {"peer": Broken()})
    monkeypatch.setattr(layer, "is_served_badly", lambda: served_badly)
    shape, cpu = layer.Shape(8, 8, 2, 1, 8), torch.device("cpu")
    rows = layer.measure(shape, torch.float32, ["auto"], 1, True, False, cpu, (1.0, 1.0))
    assert [row["system"] for row in rows] == ["dense", *others, "moesaic auto"]
    for error in (ImportError("not installed"), ValueError("hidden_size=8 is too small")):
        with layer.or_named("another"):
            raise error
    assert capsys.readouterr().out.splitlines() == [
        "peer does not run in torch.float32: TypeError: forward() takes no such thing",
        "another is not built: ValueError: hidden_size=8 is too small",
    ]


def test_the_benchmark_of_one_neuron_experts_prints_a_row_with_recall_1():
    args = argparse.Namespace(tokens=32, dim=8, heads=2, top_k=3, rounds=2, recall_tokens=8)
    cells = [cell.strip() for cell in peer.measure(49, args).strip("|").split("|")]
    assert cells[0] == "49"
    assert cells[7] == "1.0000"
    assert len(cells) == 10


def test_low_rank_experts_are_compared_at_equal_outputs_and_gradients(capsys):
    sizes = ["--tokens", "256", "--dim", "16", "--out_dim", "24", "--experts", "4", "--rank", "2"]
    assert lora_experts.main([*sizes, "--rounds", "2", "--threads", "1", "--no_peak"]) == 0
    _machine, _head, _rule, *rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [*lora_experts.SYSTEMS, *(f"{name}, and the linear" for name in lora_experts.SYSTEMS)]
    with pytest.raises(SystemExit):
        lora_experts.main(["--tokens", "100"])


def test_every_kind_of_experts_costs_a_token_the_same():
    shape = experts.Shape()
    ffn = 2 * 4 * shape.D * shape.F + 2 * shape.D * 8
    assert experts.at_equal_flops("ffn", shape).flops_per_token(shape.D) == ffn
    for kind in experts.KINDS:
        cost = experts.at_equal_flops(kind, shape).flops_per_token(shape.D, tokens_per_sequence=shape.S)
        assert abs(cost / ffn - 1) < 0.02, kind


def test_the_benchmark_of_experts_prints_a_row_for_the_dense_ffn_and_each_kind(capsys, tmp_path):
    argv = [
        "--small",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--kinds",
        "ffn",
        "ia3",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert experts.main(argv) == 0
    _machine, _head, _rule, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dense", "ffn", "ia3"]
    saved = json.loads((tmp_path / "rows.json").read_text())["rows"]
    # A dense FFN of width 2 F = 512 at D = 128 with its biases, and 8 experts of F = 256 with the router's 8 D.
    assert [row["num_params"] for row in saved[:2]] == [2 * 128 * 512 + 512 + 128, 8 * 2 * 128 * 256 + 8 * 128]


def test_each_conversion_to_fewer_experts_leaves_a_smaller_model_of_the_same_widths():
    model, x = nn.Sequential(core.MoEConfig(8, core.TokenChoice(2), core.FFN(32)).build(4)), torch.randn(2, 30, 4)
    statistics = core.expert_statistics(model, [x], every_token=True)
    sizes = []
    for _name, convert in fewer_experts.conversions([0.5]):
        converted = copy.deepcopy(model)
        convert(converted, statistics)
        assert converted(x).shape == x.shape
        sizes.append(sum(p.numel() for p in converted.parameters()))
    # 256 numbers an expert and 4 a row of the gate: 8 experts, half of them, half with 4 vectors, and one without gate.
    assert sizes == [2080, *[1040] * 5, 4 * 256 + 8 * 4 + 4 * 4, 1040, *[256] * 6]
