"""A short training with each of the two encodings of numbers by thresholds: validation decides between them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import core
from apps.data.array_files import ArraysInMemory, ArrayWriter
from apps.data.given import NUMBERS
from apps.recsys.encoding.features import CategoricalFeature, Features
from apps.recsys.tables.columns.bottoms import SharedBottom
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.model import MultiTaskModel
from apps.recsys.tables.outputs import labeled_mean
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.rows import TableRows

log = logging.getLogger(__name__)

Kind = Literal["bins", "linear"]
_STEPS, _BATCH, _LR = 300, 256, 4e-3
_MOST_TRAIN, _MOST_VAL = 50_000, 20_000
_MOST_ROWS = 1_000
"""Rows of a category's table, which its values share: a step must not take as long as a table is large."""


def better_kind(
    features: Features, columns: ArrayWriter | ArraysInMemory, train_N: NDArray[np.bool_], val_N: NDArray[np.bool_]
) -> Kind:
    """Return the encoding of numbers whose network has the lower loss in validation, within 300 steps of 256 rows.

    The network is an MLP of two layers of 192 over numbers, vectors and categories of one value. Without rows to
    validate, it is "bins" if a task has classes, else "linear". No random generator is changed.

    Args:
        features: the columns, with thresholds.
        columns: arrays of the table.
        train_N, val_N: (N,), the rows of these splits.
    """
    of_numbers = all(target.kind in NUMBERS for target in features.target_of_task)
    kinds: tuple[Kind, Kind] = ("linear", "bins") if of_numbers else ("bins", "linear")
    if not val_N.any():
        return kinds[0]
    train, val = (
        TableRows(columns, features, torch.from_numpy(_some(split_N, most)))
        for split_N, most in ((train_N, _MOST_TRAIN), (val_N, _MOST_VAL))
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        loss, other = (_least_loss(kind, features, train, val) for kind in kinds)
    chosen, rest = kinds if loss <= other else kinds[::-1]
    log.info(
        "numbers: %s, by the loss in validation of a short training: %s %.4f, %s %.4f; for the other table.numbers: %s",
        *(chosen, kinds[0], loss, kinds[1], other, rest),
    )
    return chosen


def _some(split_N: NDArray[np.bool_], most: int) -> NDArray[np.int64]:
    """Return the rows of a split, at most so many, in random order."""
    return np.random.default_rng(0).permutation(np.flatnonzero(split_N))[:most]


def _least_loss(kind: Kind, features: Features, train: TableRows, val: TableRows) -> float:
    """Return the least loss in validation, summed over the tasks, of a short training: few rows are soon overfitted."""
    torch.default_generator.manual_seed(0)
    single = tuple(CategoricalFeature(f.name, min(f.num_rows, _MOST_ROWS)) for f in features.single)
    read = replace(features, numbers=kind, categorical=single, sequences=())
    shared, embedding = SharedBottom(expert=core.MLP((192, 192))), EmbeddingConfig(dim=16, init_std=0.1)
    model = MultiTaskModel(read, shared, embedding, dense=DenseConfig("by_label"))
    optimizer = torch.optim.AdamW(model.parameters(), _LR, weight_decay=0.0, fused=True)

    def loss_of(batch: TableBatch) -> Tensor:
        batch = replace(batch, single_FB=batch.single_FB % _MOST_ROWS, lists=())
        value_Bt = model.head.outputs.losses(model(batch), batch.label_Bt)
        return labeled_mean(value_Bt, batch.label_Bt, batch.weight_Bt).sum()

    places = torch.cat([torch.randperm(len(train)) for _ in range(-(-_STEPS * _BATCH // len(train)))])
    losses = [math.inf]
    for step, place_B in enumerate(places.split(_BATCH)[:_STEPS], start=1):
        for group in optimizer.param_groups:
            group["lr"] = _LR * (1 - (step - 1) / _STEPS)
        optimizer.zero_grad()
        loss_of(train.__getitems__(place_B)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in (_STEPS // 9, _STEPS // 3, _STEPS):
            with torch.no_grad():
                parts = [val[first : first + 2_048] for first in range(0, len(val), 2_048)]
                losses.append(sum(float(loss_of(part)) * len(part) for part in parts) / len(val))
    return min(loss for loss in losses if not math.isnan(loss))
