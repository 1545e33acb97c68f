"""The report of a retriever: groups by hand, the experts' items, and what a test leaves."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from made_pairs import made_pairs, retriever

from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.retrieval.report import RetrievalUse, pairs_table, write_ranks
from apps.report.page import load_sections

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def made_use(**changed):
    # Items 1 and 2 are of the first and the last quarter; item 0 is in no catalog.
    values = {
        "ks": (2, 5), "group_V": np.array([4, 0, 3]), "item_N": np.array([1, 1, 2, 0]),
        "rank_N": np.array([1, 4, 9, 3]), "best_Nk": np.array([[1, 2], [2, 1], [1, 0], [2, 1]]),
        "users": ["ann", "bob", "cy", "dot"], "index": ItemIndex(["tea", "rye"], torch.ones(2, 1)), "use": None,
    }  # fmt: skip
    return RetrievalUse(**{**values, **changed})


def test_the_metrics_of_groups_by_hand(tmp_path):
    section = write_ranks(made_use(), tmp_path)
    with open(tmp_path / "popularity.csv", newline="") as file:
        popular, least, unknown = csv.DictReader(file)
    assert popular == {
        "popularity": "most popular", "pairs": "2", "recall_2": "0.5", "recall_5": "1.0", "mrr": "0.625",
        "median_rank": "2.5",
    }  # fmt: skip
    assert (least["popularity"], least["recall_5"]) == ("least popular", "0.0")
    assert (unknown["popularity"], float(unknown["mrr"])) == ("not in training", pytest.approx(1 / 3))
    table, chart = section.parts
    assert table.rows[0] == ("most popular", "2", "50.00", "100.00", "62.50", "2")
    assert chart.summary == "Recall@5 is highest for most popular, 100.0 %, and lowest for least popular, 0.0 %."


def test_pairs_are_shown_by_name():
    assert pairs_table(made_use(), [2, 3]).rows == (
        ("cy", "rye", "9", "tea"),
        ("dot", "not in the catalog", "3", "rye · tea"),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_test_leaves_the_report(tmp_path):
    data = made_pairs(tmp_path, user_column="user")
    module = retriever(data)
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=module.report_callbacks(), **QUIET)
    run.test(module, datamodule=data, verbose=False)
    assert {"popularity.csv", "expert_popularity.png", "items.safetensors"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }
    titles = [section.title for section in load_sections(tmp_path / "report")]
    assert titles == ["What is retrieved", "What the experts are used for", "Pairs"]
    use = RetrievalUse.of(module, [data.examples("test").__getitems__([0, 1, 2])])
    assert use.users == ["ann", "bob", "cy"]
    ((layer, counts),) = use.use.counts["popularity"].items()
    assert layer == "item block 0"
    # Alien and Dune have 2 of 6 pairs each: Alien is the first quarter, Dune begins in the second; two experts an item
    assert counts.sum(1).tolist() == [2, 2, 2, 2, 2]
