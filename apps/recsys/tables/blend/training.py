"""The end of a training with a blend: trees are trained, weights found, and both kept with the checkpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from apps.recsys.tables.blend.blend import KEY, Blend, in_order
from apps.recsys.tables.blend.trees import BlendTrees
from apps.recsys.tables.estimators.base import TaskData
from apps.recsys.tables.estimators.boosting import FrequentValues
from apps.recsys.tables.rows.batch import TableBatch
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO
from apps.train.checkpoint.paths import find_checkpoint, is_sharded
from core.convert.read.calls import evaluating

_logger = logging.getLogger(__name__)

_SEED, _BATCH = 0, 4096


class TrainsBlend(Callback):
    """Trains the trees of a ``MultiTaskRecommender`` after its network, on the process of rank 0.

    The blend belongs to the checkpoint that a test uses: the average of the last epochs, else the best, else the last.
    A training that is stopped has no trees yet; resumed, it trains them at its end.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        negatives = getattr(data, "negatives", None)
        if not hasattr(data, "rows") or (negatives is not None and negatives.kind == "items"):
            raise ValueError(
                "model.blend='lightgbm' needs a TableData of labeled rows, without sampled items: set it to null"
            )

    # Later than the callback that writes the average of the last epochs.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            if trainer.is_global_zero and not trainer.fast_dev_run:
                self._train(trainer, pl_module)
        finally:
            trainer.strategy.barrier("blend")

    def _train(self, trainer: Trainer, module: Any) -> None:
        path = _checkpoint_of(trainer)
        if path is None or is_sharded(path):
            _logger.warning(
                "model.blend: there is no checkpoint in one file that trees could be kept with: none are made"
            )
            return
        began = time.monotonic()
        model = type(module).load_from_checkpoint(path, module.device, blend=None)
        blend = blended(model, trainer.datamodule, path.stem)  # type: ignore[attr-defined]
        blend.write(path.parent)
        checkpoint = AtomicCheckpointIO()
        checkpoint.save_checkpoint({**checkpoint.load_checkpoint(path), KEY: blend.record()}, path)
        for task in blend.features.tasks:
            _logger.info("%s: %s", task, blend.signature(task))
        _logger.info("trees trained in %.1f s: beside %s", time.monotonic() - began, path)


def _checkpoint_of(trainer: Trainer) -> Path | None:
    """Return the checkpoint that a test of the training uses; None if there is none."""
    for callback in reversed(trainer.checkpoint_callbacks):  # the run's own comes after the user's
        folder, best = getattr(callback, "dirpath", None), getattr(callback, "best_model_path", "")
        try:
            return find_checkpoint(Path(folder or best))
        except FileNotFoundError:
            if best:
                return Path(best)
    return None


def blended(model: Any, data: Any, stem: str) -> Blend:
    """Return the blend of a trained network: trees of the training rows, and weights of the least validation loss.

    A task that trees cannot learn is left to the network: one with one class, or without labels in a split.

    Args:
        model: the ``MultiTaskRecommender``.
        data: its data, which are set up: a ``TableData``.
        stem: first word of the names of the blend's files.
    """
    features, outputs = model.features, model.outputs
    library = BlendTrees(1 / len(features.tasks), model.head.has_steps)
    train_rows, val_rows = data.rows("train"), data.rows("val")
    order = np.random.default_rng(_SEED).permutation(len(train_rows))
    some = np.sort(order[: library.most_rows(features, outputs.kinds)])
    train, val = (in_order(batch, features) for batch in (train_rows.__getitems__(some), val_rows[:]))
    own = outputs.split(_network(model, val_rows))
    weights, texts = dict[str, float](), dict[str, str]()
    with library.threads():
        for t, (name, task) in enumerate(library.tasks_of(train, val, _SEED).items()):
            weights[name] = 1.0
            if isinstance(task, TaskData) and len(task.yv_N):
                weights[name], trees = library.blended(task, own[t][task.kept_V].numpy())
                if weights[name] < 1:
                    texts[name] = trees.model.model_to_string(num_iteration=trees.iterations)
    return Blend(features, FrequentValues.counted(train), weights, texts, stem)


def _network(model: Any, rows: Any) -> Tensor:
    """Return the network's outputs of all rows, float32 (N, Z), on the CPU."""
    parts = []
    with torch.no_grad(), evaluating(model):
        for begin in range(0, len(rows), _BATCH):
            batch: TableBatch = rows[begin : begin + _BATCH]
            parts.append(model(batch.to(model.device)).float().cpu())
    return torch.cat(parts)
