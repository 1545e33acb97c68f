"""A retriever that runs its graphs, and the documented script."""

from __future__ import annotations

import numpy as np
import pytest
from doc_scripts import script
from made_pairs import made_pairs, retriever
from reexported import assert_alike, reexported
from torch_graphs import output_in_torch

from apps.recsys.retrieval import export as module

USERS = {"user": ["cy", "ann", "zoe"], "age": [50, 30, 25], "stars": [1, 2, 3]}


def test_the_items_of_a_script_and_of_the_model_are_those_of_the_weights(tmp_path):
    data = made_pairs(tmp_path, user_column="user", exclude_seen=True)
    model = retriever(data).eval()
    model.adopt_encoding({"encoding": data.encoding_state})
    exported, export = reexported(model, tmp_path)
    for seen in (False, True):
        expected = model.predict(USERS, top=9, include_seen=seen)
        found = exported.predict(USERS, top=9, include_seen=seen)
        assert list(found["film"]) == list(expected["film"])
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-5)

    lines = [",".join(USERS), *(",".join(map(str, row)) for row in zip(*USERS.values(), strict=True))]
    (tmp_path / "users.csv").write_text("\n".join(lines) + "\n")
    printed = output_in_torch(
        script("docs/reference/onnx_scripts.md", "retrieve.py"), export, str(tmp_path), str(tmp_path / "users.csv")
    )
    pairs = zip(expected["row"], expected["film"], expected["score"], strict=True)
    by_user: list[list[str]] = [[], [], []]
    for row, film, score in pairs:
        by_user[row].append(f"{film}={score:.6f}")
    assert_alike(printed, [" ".join(films) for films in by_user])


def test_a_damaged_catalog_is_refused():
    with pytest.raises(ValueError, match=r"catalogue\.npz is damaged"):
        module._catalog(b"PK\x03\x04 and no more")
