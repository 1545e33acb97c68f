"""A recommender of next items that runs its graph, and the documented script."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from doc_scripts import script
from reexported import assert_alike, reexported
from torch_graphs import output_in_torch

from apps.recsys.sequence.data import HistoryData
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender

EVENTS = {
    "user": ["ann", "ann", "bob", "ann", "bob", "ann", "dot", "ann"],
    "item": [30, 10, 50, 20, 10, 40, 60, 50],
    "time": [3, 1, 9, 2, 9, 4, 1, 5],
}
HISTORIES = [[10, 20, 30, 40, 50], [50], [99], [30, 20]]


@pytest.mark.parametrize("times", [0, 8])
def test_the_items_of_a_script_and_of_the_model_are_those_of_the_weights(tmp_path, times):
    pa.csv.write_csv(pa.table(EVENTS), tmp_path / "clicks.csv")
    data = HistoryData("table", file=str(tmp_path / "clicks.csv"), cache_dir=str(tmp_path), max_length=4)
    torch.manual_seed(0)
    config = HistoryModelConfig(dim=8, depth=1, mixing="hstu" if times else "mixture", time_buckets=times)
    model = NextItemRecommender(data.num_items, data.max_length, config, report=None).eval()
    torch.nn.init.normal_(model.model.item_embed.weight)
    model.adopt_encoding({"encoding": data.encoding_state})

    exported, export = reexported(model, tmp_path)
    expected = model.predict(HISTORIES)
    for own, best in zip(exported.predict(HISTORIES), expected, strict=True):
        assert [item for item, _ in own] == [item for item, _ in best]
        assert [score for _, score in own] == pytest.approx([score for _, score in best], rel=1e-5)
    for own, best in zip(exported.predict(EVENTS)["score"], model.predict(EVENTS)["score"], strict=True):
        assert own == pytest.approx(best, rel=1e-5)
    if not times:
        printed = output_in_torch(script("docs/reference/onnx_scripts.md", "next_items.py"), export, "model.onnx", "30", "99", "20")
        assert_alike(printed, [f"{item} {score:.6f}" for item, score in expected[3]])
