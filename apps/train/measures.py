"""Callbacks that log the size of the model, once, and the speed of the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from apps.train.cost import measure_cost, megaflops

_logger = logging.getLogger(__name__)


class ModelSize(Callback):
    """Logs parameters, active parameters and forward FLOPs an example, once a run.

    They are counted on the first batch of the validation, as in a comparison, or else on the first of the training.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx:
            return
        validation = _validation_batch(trainer)
        cost = measure_cost(pl_module, batch if validation is None else validation)  # type: ignore[arg-type]
        flops_per_example = float(cost.flops_per_example)
        if trainer.world_size > 1:  # where experts are divided, each process computes as many rows as chose its own
            own = torch.tensor(flops_per_example, device=pl_module.device)
            flops_per_example = float(trainer.strategy.reduce(own, reduce_op="mean"))
        on_other_ranks = getattr(trainer.strategy, "num_params_elsewhere", 0)
        num_params, active_params = cost.num_params + on_other_ranks, cost.active_params + on_other_ranks
        size = {
            "model/num_params": float(num_params),
            "model/active_params": float(active_params),
            "model/flops_per_example": flops_per_example,
        }
        for logger in trainer.loggers:
            logger.log_metrics(size, step=0)
        if rank_zero_only.rank == 0:
            flops = f"{megaflops(flops_per_example)} MFLOPs {cost.unit} (forward)"
            name = type(pl_module).__name__
            _logger.info(f"{name}: {num_params:,} parameters, {active_params:,} active, {flops}")


def _validation_batch(trainer: Trainer) -> Any:
    """Return the first batch of the validation, on the device; None without a validation."""
    loader: Any = trainer.val_dataloaders
    while isinstance(loader, (list, tuple)):
        loader = next(iter(loader), None)
    if loader is None or isinstance(loader, Mapping):
        return None
    with torch.random.fork_rng(devices=[]):  # a pass over a loader draws a seed for its workers
        batch = next(iter(loader), None)
    if batch is None:
        return None
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


class Throughput(Callback):
    """Logs ``train/examples_per_second`` of all processes together, without the time of validations.

    It reads the module's ``num_trained``, the number of examples that this process has trained on.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not trainer.global_step and not batch_idx:  # ``ModelSize`` has just counted
            self._restart(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        examples = pl_module.num_trained - self._counted
        if examples and trainer.global_step % trainer.log_every_n_steps == 0:
            rate = examples / (time.perf_counter() - self._since) * trainer.world_size
            pl_module.log("train/examples_per_second", rate, batch_size=1)
            self._restart(pl_module)

    def _restart(self, module: LightningModule) -> None:
        self._since, self._counted = time.perf_counter(), module.num_trained
