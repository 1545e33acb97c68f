"""Callbacks that log the size of the model, once, and the speed, gradients and memory of the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from apps.train.cost.flops import measure_cost, megaflops
from apps.train.cost.footprint import used_memory
from apps.train.lightning_internals import handles_unscaling
from core.optim import coalesced
from core.parallel import total_norm

_logger = logging.getLogger(__name__)


class ModelSize(Callback):
    """Logs parameters, active parameters and forward FLOPs per example, once per run.

    They are counted on the first batch of the validation, as in a comparison, or else on the first of the training.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx:
            return
        validation = _validation_batch(trainer)
        cost = measure_cost(pl_module, batch if validation is None else validation)  # type: ignore[arg-type]
        flops_per_example = float(cost.flops_per_example)
        if trainer.world_size > 1:  # with sharded experts, each process computes as many rows as chose its own
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


class TrainingMeasures(Callback):
    """Logs speed, learning rates, norm of the gradients and peak memory of a training, at the steps that are logged.

    ``lr-*`` are Lightning's ``LearningRateMonitor``'s, unless the trainer has one itself.
    ``train/examples_per_second`` counts all processes together, without the time of validations; it needs the module's
    ``num_trained``, the number of examples that this process has trained on. ``train/grad_norm`` is the norm before
    clipping, of the parameters that the last optimizer updates; ``train/peak_memory_mib`` covers this process since its
    start, on the GPU if there is one.
    """

    _norm: Tensor | None = None
    _rates: LearningRateMonitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(pl_module)
        if trainer.loggers and not any(isinstance(c, LearningRateMonitor) for c in trainer.callbacks):
            # As a callback of the trainer it would cost each step 0.07 ms: Lightning calls every hook of each callback.
            self._rates = LearningRateMonitor("step")
            self._rates.on_train_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not trainer.global_step and not batch_idx:  # ``ModelSize`` has just counted
            self._restart(pl_module)
        if self._rates is not None:
            self._rates.on_train_batch_start(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._since += time.perf_counter() - self._paused

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # FSDP1's gradients are parts of flat tensors, whose norm no process knows.
        if (trainer.global_step + 1) % trainer.log_every_n_steps or isinstance(trainer.strategy, FSDPStrategy):
            return
        self._norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._norm is not None and scaler is not None and handles_unscaling(optimizer):
            self._norm = self._norm / scaler.get_scale()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return
        measured: dict[str, Any] = {"train/peak_memory_mib": used_memory(pl_module.device, peak=True) / 2**20}
        if self._norm is not None:
            measured["train/grad_norm"], self._norm = self._norm, None
        if examples := _num_trained(pl_module) - self._counted:
            seconds = time.perf_counter() - self._since
            measured["train/examples_per_second"] = examples / seconds * trainer.world_size
            self._restart(pl_module)
        pl_module.log_dict(measured, batch_size=1)

    def _restart(self, module: LightningModule) -> None:
        self._since, self._counted = time.perf_counter(), _num_trained(module)


def _num_trained(module: LightningModule) -> int:
    return getattr(module, "num_trained", 0)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """Return the norm of all gradients together, (), on their device; None if there is none.

    If parameters are sharded over processes, each of them calls it.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(p, DTensor) for p in parameters):
        return total_norm(grads)
    return get_total_norm([coalesced(g)._values() if g.is_sparse else g for g in grads]) if grads else None
