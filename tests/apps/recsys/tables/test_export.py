"""A recommender of tables that runs its graph, and the documented script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doc_scripts import script
from reexported import assert_alike, reexported
from torch_graphs import output_in_torch

import core
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender

# Values that training has and lacks, and missing ones.
ROWS = {
    "city": ["Oslo", "Paris", "", "Rome", "Rome"],
    "tags": ["z|y", "", "w", "x", "x|y"],
    "user": [1, 2, 77, 3, 1],
    "age": [25.0, None, 30.0, 31.5, 40.0],
    "shop": ["fr", "de", "de", "fr", "de"],
}


@pytest.fixture
def model(own):
    data = own()
    torch.manual_seed(0)
    embedding = EmbeddingConfig(kind="collection", dim=4, init_std=1.0)
    module = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))), embedding, report=None)
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


def written(value):
    """Return a value as pandas writes it: 77.0 for an integer of a column with missing values."""
    return "" if value is None else str(float(value) if isinstance(value, int) else value)


def test_the_scores_of_a_script_and_of_the_model_are_those_of_the_weights(model, tmp_path):
    exported, export = reexported(model, tmp_path)
    expected = model.predict(ROWS)
    scores = exported.predict(ROWS)
    assert list(scores) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5)
    assert exported.encoding_state.keys() == model.encoding_state.keys()

    columns = list(ROWS)
    lines = [
        ",".join(columns),
        *(",".join(map(written, row)) for row in zip(*ROWS.values(), strict=True)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    own = script("docs/reference/onnx_scripts.md", "score.py")
    printed = output_in_torch(own, export, "model.onnx", str(tmp_path / "rows.csv"))
    expected_lines = [
        " ".join(f"{name}={values[i]:.6f}" for name, values in expected.items()) for i in range(len(ROWS["city"]))
    ]
    assert_alike(printed, expected_lines)


def test_the_script_reads_times_and_writes_numbers(tmp_path):
    (tmp_path / "visits.csv").write_text(
        "when,price,visits,clicked\n2024/05/31,2.5,0,1\n2024-05-30T23:00:00+02:00,4.0,3,0\n"
    )
    tasks = {
        "price": TaskConfig("price", kind="regression"),
        "visits": TaskConfig("visits", kind="count"),
        "clicked": TaskConfig("clicked"),
    }
    table = TableConfig(timestamps=("when",), tasks=tasks, split=SplitConfig("given", val=0.0))
    rows = str(tmp_path / "visits.csv")
    data = TableData("table", cache_dir=str(tmp_path), train_file=rows, test_file=rows, table=table)
    embedding = EmbeddingConfig(dim=4, init_std=1.0)
    module = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))), embedding, report=None)
    module.adopt_encoding({"encoding": data.encoding_state})
    _, export = reexported(module.eval(), tmp_path)
    expected = module.predict(rows)
    own = script("docs/reference/onnx_scripts.md", "score.py")
    printed = output_in_torch(own, export, "model.onnx", rows)
    assert_alike(printed, [" ".join(f"{name}={values[i]:.6f}" for name, values in expected.items()) for i in range(2)])
