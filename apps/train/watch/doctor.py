"""``RoutingDoctor`` diagnoses the routing of a model while it trains, and reports the problems."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import core
from apps.base.checks import check_at_least
from apps.train.step.module import SparseModule
from core.convert.read.calls import evaluating
from core.diagnose.ranks import on_every_rank
from core.parallel import needs_all_ranks

_logger = logging.getLogger(__name__)


class RoutingDoctor(Callback):
    """Diagnoses the first batches of each validation, and one training step at the end, by ``core.Doctor``.

    A finding is logged once, when it comes up, and once more when it is gone. A model without MoE layers is skipped, so
    that FLOP-matched dense baselines may share a trainer's configuration. With several processes the evidence is the
    sum over all of them, each with its part of the data; the findings are the same on each, and the first one speaks.
    See docs/reference/routers/findings.md.

    Args:
        batches: validation batches that are looked at.
        classes: also ask whether the classes decide the experts, which computes these batches twice; not if
            processes share a model's parameters.
        start: weights that the training began with; None: the weights at the first step, if the callback sees it.

    Attributes:
        doctor: the evidence; None before the first validation, and for a model without MoE layers.
        findings: the last diagnosis.

    Raises:
        ValueError: fewer than one batch.

    Example::

        trainer: {callbacks: [{class_path: RoutingDoctor}]}
    """

    def __init__(self, batches: int = 4, classes: bool = False, start: core.TrainingStart | None = None) -> None:
        check_at_least(1, **{"RoutingDoctor.batches": batches})
        self.batches, self.classes = batches, classes
        self.doctor: core.Doctor | None = None
        self.findings: list[core.Finding] = []
        self._start = start
        self._watch = contextlib.ExitStack()
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run began with weights that are not here
            self._start = core.TrainingStart(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.doctor is None and core.moe_layers(pl_module):
            self.doctor = core.Doctor(pl_module, modalities=getattr(pl_module, "modality_names", ()))
        if self.doctor is not None and not trainer.sanity_checking:
            self.doctor.start = self._start
            self.doctor.begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.doctor is not None and not trainer.sanity_checking and batch_idx < self.batches:
            labels = classes_of(pl_module, batch) if self.classes and not needs_all_ranks(pl_module) else None
            self._watch.enter_context(self.doctor.watching(batch, labels))

    def on_validation_batch_end(self, *_: Any) -> None:
        self._watch.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.doctor is not None and not trainer.sanity_checking:
            self.diagnose(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.doctor is None or not self.doctor.layers:
            return
        if isinstance(pl_module, SparseModule) and on_every_rank(self._batch is not None):
            self.look_at_step(pl_module, self._batch)
        self._batch = None
        self.diagnose(pl_module)
        if not self.findings:
            _say("routing: healthy")

    def look_at_step(self, pl_module: SparseModule, batch: Any) -> None:
        """Look into a training step on a batch; the weights stay as they are."""
        assert self.doctor is not None
        self.doctor.look_at_step(
            batch, lambda module, batch: module.training_loss(batch).total, pl_module.balance.weight
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watch.close()

    @torch.no_grad()
    def diagnose(self, pl_module: LightningModule) -> None:
        """Set ``findings`` by the evidence so far, and log the changes."""
        assert self.doctor is not None
        before = {(f.name, f.layer): f for f in self.findings}
        with evaluating(pl_module):
            self.findings = self.doctor.findings()
        now = {(f.name, f.layer): f for f in self.findings}
        for key, finding in now.items():
            if key not in before:
                _say(f"routing: {finding}", logging.WARNING)
        for key in before.keys() - now.keys():
            _say(f"routing: {key[1]}: no more {key[0].replace('_', ' ')}")


@rank_zero_only
def _say(line: str, level: int = logging.INFO) -> None:
    _logger.log(level, line)


@torch.no_grad()
def classes_of(pl_module: LightningModule, batch: Any) -> Tensor | None:
    """Return the classes of a batch, int64, if the module's task has one per sequence or token; else None."""
    if not isinstance(pl_module, SparseModule):
        return None
    targets = pl_module.task_loss(batch).targets
    is_class = isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64
    return targets if is_class else None
