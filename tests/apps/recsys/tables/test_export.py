"""A recommender of tables that runs its graph, and the documented script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doc_scripts import script
from reexported import assert_alike, reexported
from torch_graphs import output_in_torch

import core
from apps.recsys.tables.embedding import EmbeddingConfig
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
        *(",".join("" if v is None else str(v) for v in row) for row in zip(*ROWS.values(), strict=True)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    printed = output_in_torch(script("docs/serving.md", "score.py"), export, "model.onnx", str(tmp_path / "rows.csv"))
    expected_lines = [
        " ".join(f"{name}={values[i]:.6f}" for name, values in expected.items()) for i in range(len(ROWS["city"]))
    ]
    assert_alike(printed, expected_lines)
