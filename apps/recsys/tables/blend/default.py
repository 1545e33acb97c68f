"""What ``moesaic init`` writes for a table, as a system of a comparison: two dense layers and boosted trees."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from apps.base.quiet import quiet
from apps.data.given import NUMBERS
from apps.equal_cost.comparison import Search
from apps.recsys.encoding.features import Features
from apps.recsys.tables.blend.training import blended
from apps.recsys.tables.estimators.base import PerTask
from apps.recsys.tables.recipe import Size, network
from apps.recsys.tables.rows.arrays import TableArrays
from apps.recsys.tables.rows.batch import TableBatch
from core.convert.read.calls import evaluating

_logger = logging.getLogger(__name__)

_PACE_STEPS, _BATCH = 30, 4096
_SHARE = 0.6
"""Share of the time of a search that the network may train; the trees take most of the rest."""


class DefaultBlend(PerTask):
    """The recipe of ``apps.recsys.tables.recipe`` for the table at hand, trained in one go.

    Args:
        make: ``MultiTaskRecommender``, whose baseline it is.
        steps: see ``PerTask``.
    """

    kind = "blend"

    def __init__(self, make: Callable[..., Any], steps: bool = False) -> None:
        super().__init__(steps=steps)
        self.make = make

    def tune(self, data: Any, seed: int, search: Search | None = None) -> dict[str, dict[str, Any]]:
        """Return the epochs of the recipe, or as many as the time of the search allows at the pace of a few steps."""
        size = size_of(data.features, len(data.rows("train")))
        epochs = size.epochs
        if search is not None and math.isfinite(search.minutes):
            began = time.perf_counter()
            self._train(data, size, seed, max_steps=_PACE_STEPS)
            pace = (time.perf_counter() - began) / _PACE_STEPS
            steps = math.ceil(size.num_rows / size.batch_size)
            epochs = max(min(epochs, int(60 * search.minutes * _SHARE / (pace * steps))), 1)
        return {"network": {"epochs": epochs}}

    def fit(self, data: Any, seed: int, settings: Any = None) -> None:
        settings = self.tune(data, seed) if settings is None else settings
        size = size_of(data.features, len(data.rows("train")))
        self.model = self._train(data, size, seed, max_epochs=settings["network"]["epochs"])
        self.blend = blended(self.model, data, "default")
        self.chosen = {task: {"network": settings["network"], "weight": w} for task, w in self.blend.weights.items()}
        for task in data.features.tasks:
            _logger.info("%s: %s", task, self.blend.signature(task))

    def predicted(self, data: Any, split: Literal["val", "test"], arrays: TableArrays) -> np.ndarray:
        rows, parts = data.rows(split), list[Tensor]()
        with torch.no_grad(), evaluating(self.model):
            for begin in range(0, len(rows), _BATCH):
                batch: TableBatch = rows[begin : begin + _BATCH]
                parts.append(self.blend.mixed(self.model.outputs, self.model(batch), batch))
        return torch.cat(parts).double().numpy()

    def _train(self, data: Any, size: Size, seed: int, **limit: int) -> Any:
        seed_everything(seed, verbose=False)
        given = {**network(size, sparse=False), "blend": None}
        if not data.features.numbers:
            given["dense"] = {"kind": "quantile_normal", "num_bins": 32}
        model = self.make(features=data.features, **given)
        model.reports = False
        own_size, data.batch_size = data.batch_size, size.batch_size
        try:
            with tempfile.TemporaryDirectory(prefix="moesaic-") as folder, quiet(own_notes=False):
                best = ModelCheckpoint(folder, monitor="val/loss", save_weights_only=True)
                stops = EarlyStopping("val/loss", patience=5, check_on_train_epoch_end=False)
                trainer = Trainer(
                    accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                    num_sanity_val_steps=0, gradient_clip_val=1.0, callbacks=[best, stops], **limit,
                )  # fmt: skip
                trainer.fit(model, datamodule=data)
                if best.best_model_path:
                    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        finally:
            data.batch_size = own_size
        return model


def size_of(features: Features, num_rows: int) -> Size:
    """Return what the recipe depends on, of a table that is encoded."""
    rows = [f.num_rows for f in features.categorical] + [f.num_rows for f in features.sequences]
    return Size(
        num_rows=num_rows,
        has_ids=max(rows, default=0) > max(num_rows / 100, 20),
        num_numbers=len(features.continuous),
        has_categories=bool(rows or features.vectors),
        are_numbers=all(target.kind in NUMBERS for target in features.target_of_task),
    )
