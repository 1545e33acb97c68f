"""The network and the training of a table by default, chosen from its size and its columns.

Each line was compared with LightGBM on public tables:

- two layers of 192, shared by all tasks, over numbers encoded by the label and embedded categories;
- dropout of the input 0.05 without categories, else 0.1; of the layers 0.2 without categories, else 0.1;
- AdamW at 0.002, at 0.004 if every task is a number; 5 % warm-up, then a cosine to zero; norms clipped at 1;
- batches of a sixteenth of the rows, from 32 to 256, and to 512 from 200,000 rows on;
- 7 epochs with ids (a category that has a value for a hundred rows or fewer); else 40 below 20,000 rows, 15 below
  30,000, then 8; fewer if validation is worse five times;
- above 500 columns of numbers each is a quantile and a score, not encoded by the label;
- boosted trees beside it, weighted on validation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from apps.data.given import EXPERTS

_WIDTH = 192
_EXPERT_WIDTH = 112
"""Of 2 experts a row, which cost about as much as two layers of ``_WIDTH``."""

_MOST_BY_LABEL = 500
"""Columns of numbers: with 5,000 the first layer has 15 million weights, and a step takes seconds."""


@dataclass(frozen=True)
class Size:
    """What the recipe depends on.

    Attributes:
        num_rows: training rows with a label.
        has_ids: whether a category has more than 20 values, and one for at most a hundred rows.
        num_numbers: columns of numbers and dates.
        has_categories: whether there is a column that is not a number or a date.
        are_numbers: whether every task predicts a number.
    """

    num_rows: int
    has_ids: bool
    num_numbers: int
    has_categories: bool
    are_numbers: bool

    @property
    def batch_size(self) -> int:
        """Rows of a training step."""
        most = 512 if self.num_rows >= 200_000 else 256
        return min(max(2 ** math.floor(math.log2(max(self.num_rows / 16, 1))), 32), most)

    @property
    def epochs(self) -> int:
        if self.has_ids:
            return 7
        return 40 if self.num_rows < 20_000 else 15 if self.num_rows < 30_000 else 8

    @property
    def by_label(self) -> bool:
        """Whether numbers are encoded by the label."""
        return 0 < self.num_numbers <= _MOST_BY_LABEL

    @property
    def dropout(self) -> float:
        return 0.1 if self.has_categories else 0.05


def network(size: Size, sparse: bool) -> dict[str, Any]:
    """Return the arguments of a ``MultiTaskRecommender``: two dense layers and trees, or with ``sparse``
    experts that cost as much as the layers."""
    return {
        "shared": experts() if sparse else layers(size.has_categories),
        **({} if sparse else {"blend": "lightgbm"}),
        # An id with few rows starts near 0, where it says nothing.
        "embedding": {"dim": 16, "init_std": 0.001 if size.has_ids else 0.1},
        **({"dense": {"kind": "by_label" if size.by_label else "quantile_normal"}} if size.num_numbers else {}),
        "head": {"hidden_dims": []},
        "dropout": size.dropout,
        "optimizer": {
            "lr": 0.004 if size.are_numbers else 0.002,
            "weight_decay": 3.0e-4,
            "betas": [0.9, 0.99],
            "warmup_steps": 0.05,
            "fused": True,
        },
    }


def layers(has_categories: bool) -> dict[str, Any]:
    """Return the two layers that all tasks share."""
    dropout = 0.1 if has_categories else 0.2
    expert = {"class_path": "core.MLP", "init_args": {"hidden_dims": [_WIDTH, _WIDTH], "dropout": dropout}}
    return {"class_path": "apps.recsys.tables.columns.bottoms.SharedBottom", "init_args": {"expert": expert}}


def experts() -> dict[str, Any]:
    """Return 8 experts of two layers, of which a row takes 2."""
    expert = {"class_path": "core.MLP", "init_args": {"hidden_dims": [_EXPERT_WIDTH, _EXPERT_WIDTH], "dropout": 0.1}}
    balance = {"load_balancing_loss": 0.01, "router_z_loss": 0.001}
    return {"class_path": "core.MMoE", "init_args": {**EXPERTS, "expert": expert, "balance": balance}}


def trainer(size: Size) -> dict[str, Any]:
    """Return the trainer's options."""
    stops = {"monitor": "val/loss", "mode": "min", "patience": 5, "check_on_train_epoch_end": False}
    return {
        "max_epochs": size.epochs,
        "gradient_clip_val": 1.0,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stops}],
    }
