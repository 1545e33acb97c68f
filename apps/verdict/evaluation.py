"""The quality of a trained model by example, and the use of its experts, on some batches of a split."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data import DataLoader

import core
from apps.base.evaluation import in_evaluation
from apps.data.loader import as_it_is
from apps.runner.budget import Budget
from apps.train.step.balanced import routing_metrics
from apps.train.step.module import SparseModule

BLOCKS = 16
"""Parts of the test split that stand for its examples where a module tells its quality of whole passes alone."""


@dataclass(frozen=True)
class Evaluated:
    """The quality of a model on some examples.

    Attributes:
        name: name of the quality, such as "auc".
        values_N: float64 (N,), whose mean is the quality: one an example, or one a block of batches.
        higher_is_better: True where a larger quality is better.
        routing: figures of the routing, means over the layers; empty without experts.
    """

    name: str
    values_N: np.ndarray
    higher_is_better: bool
    routing: Mapping[str, float] = field(default_factory=dict)

    @property
    def quality(self) -> float:
        return float(self.values_N.mean())


def evaluate(
    model: Any, trainer: Trainer, loader: Iterable[Any], most: int | None, budget: Budget, stage: str = "val"
) -> Evaluated:
    """Return the quality of ``model`` on the first ``most`` batches of ``loader``.

    The module's own values by example are taken where it has them. Else ``stage`` says whether its validation ("val")
    or its test ("test") is run; a test is run by blocks of batches, whose qualities are the values then.

    Args:
        model: a trained ``SparseModule``, or an ``OwnModel``.
        trainer: the trainer that trained it.
        loader: batches, in the same order for every model.
        most: None: all batches.
        budget: is asked after each batch.
        stage: "val" or "test".

    Raises:
        BudgetOver: the time is up.
        ValueError: there is no batch, or the module does not log its quality.
    """
    batches = itertools.islice(loader, most)
    if isinstance(model, SparseModule):
        evaluated = _by_example(model, trainer, batches, budget)
        if evaluated is not None:
            return evaluated
        batches = itertools.islice(loader, most)
    return _by_block(model, trainer, list(batches), budget, stage)


def _by_example(model: Any, trainer: Trainer, batches: Iterator[Any], budget: Budget) -> Evaluated | None:
    device = trainer.strategy.root_device
    outs, stats = [], core.RoutingStats({})
    model.to(device)
    with in_evaluation(model), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in batches:
            with core.record(model) as tape:
                outs.append(model.task_loss(move_data_to_device(batch, device)))
            stats = stats + core.RoutingStats.from_tape(tape)
            budget.check()
    if not outs:
        raise ValueError("a split has no batch to evaluate")
    values = model.example_values(outs)
    if values is None:
        return None
    figures = {name.partition("/")[2]: float(value) for name, value in routing_metrics(stats).items()}
    means = {name: value for name, value in figures.items() if "/" not in name}
    return Evaluated(values.name, values.values_N.numpy(), values.higher_is_better, means)


def _by_block(model: Any, trainer: Trainer, batches: list[Any], budget: Budget, stage: str) -> Evaluated:
    if not batches:
        raise ValueError("a split has no batch to evaluate")
    name = model.test_monitor if stage == "test" else model.monitor
    trainer.limit_val_batches = 1.0  # it is 0 while the model is trained
    run = trainer.test if stage == "test" else trainer.validate
    count = min(len(batches), BLOCKS if stage == "test" else 1)
    values, figures = [], []
    for block in range(count):
        # Every count-th batch, so that blocks differ by at most one batch in size.
        parts: Any = batches[block::count]
        loader: DataLoader[Any] = DataLoader(parts, batch_size=None, collate_fn=as_it_is)
        logged = run(model.module, dataloaders=loader, verbose=False)[0]
        if name not in logged:
            raise ValueError(f"{stage} of {type(model.module).__name__} logs no {name!r}: it logs {', '.join(logged)}")
        values.append(float(logged[name]))
        start = f"{stage}/routing/"
        figures.append({k.removeprefix(start): v for k, v in logged.items() if k.startswith(start)})
        budget.check()
    means = {k: sum(own[k] for own in figures) / count for k in figures[0] if "/" not in k}
    is_better = model.monitor_mode == "max"
    return Evaluated(name.rpartition("/")[2], np.array(values, np.float64), is_better, means)
