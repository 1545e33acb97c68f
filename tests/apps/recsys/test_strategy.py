"""TorchRecStrategy: two processes with sharded tables train as one process, and their checkpoints serve both.

One spawn runs every scenario of two processes; each test reads the outcome of its own.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import sharded_runs as runs
import torch
import torch.multiprocessing as mp
from sharded_runs import SHARDINGS, WORLD, losses, module, train, weights

import core
from apps import sharded
from apps.recsys.bottoms import SingleTask
from apps.recsys.embedding import EmbeddingConfig
from apps.recsys.module import MultiTaskRecommender
from apps.recsys.sharding import ShardingConfig
from apps.recsys.strategy import TorchRecStrategy

# Sums of 16 float32 terms in another order are off by some 1e-7 of them; 14 steps at rates of 0.01 and 0.1 add that up.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one process, then the same on two."""
    root = tmp_path_factory.mktemp("runs")
    runs.write_table(root / "table.parquet")
    for name, (optimizer, options) in SHARDINGS.items():
        kind, net_options = "fused", {}
        if options.get("sharding") == "data_parallel":
            kind = "collection"  # stepped by the module's optimizer
        train(root, f"one {name}", module(root, kind, options.get("embedding_optimizer", optimizer), **net_options))
    train(root, "fused one", module(root, "fused"))
    for name, options in (("members", {"num_members": 2}), ("copies", {"shared": SingleTask()})):
        train(root, f"one {name}", module(root, "fused", **options))
    mp.spawn(runs.worker, args=(str(root), runs.free_port()), nprocs=WORLD)
    return root


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same_training(one: Path, two: Path, tolerance: float = TOLERANCE) -> None:
    expected, found = losses(one), losses(two)
    assert found.keys() == expected.keys()
    for name, curve in expected.items():
        assert found[name] == pytest.approx(curve, abs=tolerance), name
    there, here = weights(one), weights(two)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        error = (here[name] - tensor).abs().max().item()
        assert error <= tolerance * max(1.0, tensor.abs().max().item()), f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("name", [*SHARDINGS, "members", "copies"])
def test_two_processes_train_as_one_with_the_whole_batch(folder, name):
    assert len(losses(folder / f"one {name}")["train/loss"]) == 14
    assert_same_training(folder / f"one {name}", folder / f"two {name}")
