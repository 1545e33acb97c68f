"""The benchmarks of layers: what others install must not take a table down, and what is compared is equal."""

import argparse
import base64
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import core
from benchmarks import experts, fewer_experts, layer, lora_experts, peer, upcycling


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


def test_benchmarks_print_a_row_with_recall_1_or_compare_at_equal_outputs(capsys):
    args = argparse.Namespace(tokens=32, dim=8, heads=2, top_k=3, rounds=2, recall_tokens=8)
    cells = [cell.strip() for cell in peer.measure(49, args).strip("|").split("|")]
    assert (cells[0], cells[7], len(cells)) == ("49", "1.0000", 10)
    sizes = "--tokens 256 --dim 16 --out_dim 24 --experts 4 --rank 2 --rounds 2 --threads 1 --no_peak"
    assert lora_experts.main(sizes.split()) == 0
    _machine, _head, _rule, *rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [*lora_experts.SYSTEMS, *(f"{name}, and the linear" for name in lora_experts.SYSTEMS)]
    with pytest.raises(SystemExit):
        lora_experts.main(["--tokens", "100"])


def test_every_kind_of_experts_costs_a_token_the_same_and_has_a_row_beside_the_dense_ffn(capsys, tmp_path):
    shape = experts.Shape()
    ffn = 2 * 4 * shape.D * shape.F + 2 * shape.D * 8
    assert experts.at_equal_flops("ffn", shape).flops_per_token(shape.D) == ffn
    for kind in experts.KINDS:
        cost = experts.at_equal_flops(kind, shape).flops_per_token(shape.D, tokens_per_sequence=shape.S)
        assert abs(cost / ffn - 1) < 0.02, kind
    argv = ["--small", "--rounds", "2", "--threads", "1", "--kinds", "ffn", "ia3", "--json"]
    assert experts.main([*argv, str(tmp_path / "rows.json")]) == 0
    _machine, _head, _rule, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dense", "ffn", "ia3"]
    saved = json.loads((tmp_path / "rows.json").read_text())["rows"]
    # A dense FFN of width 2 F = 512 at D = 128 with its biases, and 8 experts of F = 256 with the router's 8 D.
    assert [row["num_params"] for row in saved[:2]] == [2 * 128 * 512 + 512 + 128, 8 * 2 * 128 * 256 + 8 * 128]


def test_each_conversion_to_fewer_experts_leaves_a_smaller_model_of_the_same_widths():
    model, x = nn.Sequential(core.MoEConfig(8, core.TokenChoice(2), core.FFN(32)).build(4)), torch.randn(2, 30, 4)
    statistics, sizes = core.expert_statistics(model, [x], every_token=True), []
    for _name, convert in fewer_experts.conversions([0.5]):
        converted = copy.deepcopy(model)
        convert(converted, statistics)
        assert converted(x).shape == x.shape
        sizes.append(sum(p.numel() for p in converted.parameters()))
    # 256 numbers an expert and 4 a row of the gate: 8 experts, half of them, half with 4 vectors, and one without gate.
    assert sizes == [2080, *[1040] * 5, 4 * 256 + 8 * 4 + 4 * 4, 1040, *[256] * 6]


def upcycled(task, tmp_path, *argv):
    path = tmp_path / "figures.json"
    options = ["--task", task, "--small", "--json", str(path), "--weights", str(tmp_path)]
    assert upcycling.main([*options, *argv]) == 0
    return path, json.loads(path.read_text())["entries"]


def check_equal_flops(entries, half_trained):
    """Check that each row is there once, that rows of a budget train for equal FLOPs, and how far each has changed."""
    rows = {entry["row"]: entry for entry in entries}
    assert list(rows) == [*half_trained, *upcycling.ROWS]
    for name, row in upcycling.ROWS.items():
        first = rows["dense" if row.budget == "dense" else "copy"]["training_flops"]
        step = rows[name]["training_flops"] / rows[name]["steps"]
        assert abs(rows[name]["training_flops"] - first) <= step / 2, name
        changed = rows[name]["changed_at_step_0"]
        begins_equal = name in ("dense", "dense_longer", "twin", "copy", "granular")
        assert changed < 1e-6 if begins_equal else changed > 1e-4, name


@pytest.mark.slow
def test_upcycling_trains_each_row_for_equal_flops_and_a_second_run_fills_what_is_missing(tmp_path, capsys):
    path, entries = upcycled("fashion_mnist", tmp_path, "--seeds", "3", "--steps", "5")
    check_equal_flops(entries, ["half_trained"])
    content = json.loads(path.read_text())
    dropped = [e for e in content["entries"] if e["row"] not in ("copy", "twin")]
    path.write_text(json.dumps({**content, "entries": dropped}))
    again = upcycled("fashion_mnist", tmp_path, "--seeds", "3", "--steps", "5")[1]
    first, second = ({e["row"]: {**e, "cpu_seconds": 0} for e in run} for run in (entries, again))
    assert second == first
    capsys.readouterr()
    assert upcycling.main(["--task", "fashion_mnist", "--table", "--json", str(path)]) == 0
    _machine, _head, _rule, *rows, _note = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[1:]] == [row.title for row in upcycling.ROWS.values()]
    with pytest.raises(ValueError, match="is of other settings"):
        upcycled("fashion_mnist", tmp_path, "--steps", "6")


def test_upcycling_of_a_sentence_encoder(tmp_path):
    pytest.importorskip("transformers")
    check_equal_flops(upcycled("titles", tmp_path, "--seeds", "0")[1], [])


def test_differences_of_upcycled_models_are_paired_by_seed_and_by_test_example():
    def entry(row, seed, right):
        return {"row": row, "seed": seed, "right": base64.b64encode(np.packbits(right).tobytes()).decode()}

    entries = [entry("copy", 0, [1, 1, 1, 0]), entry("copy", 1, [1, 1, 0, 0]), entry("copy", 2, [1, 1, 1, 1])]
    entries += [entry("twin", 1, [1, 0, 0, 0]), entry("twin", 0, [1, 0, 0, 0])]
    content = {"settings": {"test_examples": 4}, "entries": entries}
    seeds, examples = upcycling.differences(content, "copy", "twin")
    # Seed 0: 75 - 25 points, seed 1: 50 - 25. The examples' means over both seeds are 0, 100, 50 and 0.
    assert (seeds.mean, seeds.count) == (37.5, 2)
    assert seeds.half_width == pytest.approx(12.706204736 * 12.5, rel=1e-9)
    assert (examples.mean, examples.count) == (37.5, 4)
    assert examples.half_width == pytest.approx(3.182446305 * (6875 / 3) ** 0.5 / 2, rel=1e-9)
    assert upcycling.differences(content, "copy", "drop") is None
