"""Charts of a run's ``metrics.csv``."""

from __future__ import annotations

from apps.report.page import Line, LineChart, Section, Text
from apps.report.page.training import training_section

METRICS = """\
step,train/loss,val/loss,val/top1,val/bleu,routing/model.blocks.1.mlp/load_imbalance,\
routing/model.blocks.1.mlp/drop_rate,routing/load_imbalance
9,2.0,,,,1.5,0.0,1.5
19,1.0,1.5,0.5,31.5,1.25,0.0,1.25
29,,,0.75,33.5,,,
"""


def test_losses_validation_and_layers(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    *charts, never = training_section(tmp_path / "metrics.csv").parts
    assert all(isinstance(chart, LineChart) for chart in charts)
    assert {chart.title: chart.lines for chart in charts} == {
        "Loss": (Line("train", (9.0, 19.0), (2.0, 1.0)), Line("val", (19.0,), (1.5,))),
        "Validation: top1": (Line("top1", (19.0, 29.0), (0.5, 0.75)),),
        "Validation: bleu": (Line("bleu", (19.0, 29.0), (31.5, 33.5)),),
        "Load imbalance in training": (Line("block 1", (9.0, 19.0), (1.5, 1.25)),),
    }
    assert charts[0].summary == "Over optimizer steps: train from 2 to 1; val from 1.5 to 1.5."
    assert never == Text(("No routed pair was dropped.",))


def test_each_layer_of_a_block_has_its_line(tmp_path):
    names = ",".join(f"routing/model.blocks.0.{layer}/load_imbalance" for layer in ("mixing", "ffn", "depth_gate"))
    (tmp_path / "metrics.csv").write_text(f"step,{names}\n9,1.5,2.0,1.0\n")
    (chart,) = training_section(tmp_path / "metrics.csv").parts
    lines = {line.label: line.y for line in chart.lines}
    assert lines == {"block 0 mixing": (1.5,), "block 0 ffn": (2.0,), "block 0 depth gate": (1.0,)}


def test_a_run_without_a_log_has_no_section(tmp_path):
    assert training_section(tmp_path / "metrics.csv") == Section("Training")
