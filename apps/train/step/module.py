"""The training that every app shares: the auxiliary loss, the optimizer, the metrics, and the log of the routing.

An app subclasses ``SparseModule`` and brings a network, a task loss and metrics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import core
from apps import registry
from apps.base.machine import host_waits_for
from apps.train.cost.quantizing import form_of
from apps.train.lightning_internals import needs_no_unscaling, trainer_of
from apps.train.optim.averaging import WeightAverage, WeightEMA
from apps.train.optim.chosen import Chosen
from apps.train.optim.optimizers import OptimizerConfig, build_optimizer, restore_rates
from apps.train.optim.row_gradients import check_processes, clip_with_rows
from apps.train.publish.hub import HubModule
from apps.train.step.adapted import take_form
from apps.train.step.balance import Stage, StepBalance, logs_this_step
from apps.train.step.distilling import DistilConfig, Distribution, Teacher
from apps.train.step.finite import check_loss
from apps.train.step.growing import GrowConfig, freeze, grow_from, hold
from apps.train.step.measures import ModelSize, TrainingMeasures
from apps.train.step.output import TaskOutput, TrainingLoss
from core.config.plain import from_plain, to_plain
from core.fields import Bounds, Count, check_values

_logger = logging.getLogger(__name__)


class SparseModule(HubModule):
    """A LightningModule for a network that may have MoE layers, and its training.

    A subclass brings ``forward``, ``task_loss`` and ``example_inputs``, and may bring ``build_metrics`` and, to be
    taught by a trained model, ``distribution``. The weighted
    auxiliary loss of all MoE layers is added to the loss that ``training_step`` returns, so that gradient accumulation
    and AMP scale it as they scale the task's.

    Args:
        optimizer: learning rate, weight decay and schedule.
        ema_decay: decay of an exponential moving average of the weights; validation, test and the weights in a
            checkpoint are then the average. None for no average.
        average_last: number of last epochs at whose ends the weights are averaged into ``average.ckpt``, which a
            comparison tests. None for no such file.
        grow: trained model of fewer experts whose weights a training starts from, unless it resumes. None for none.
        distil: trained model whose predictions a training learns in addition to the labels. None for none.

    Raises:
        ValueError: ema_decay outside (0, 1), average_last below 1, or both; two models to start from; or a teacher of a
            model that has no ``distribution``.
    """

    monitor: str = "val/loss"
    """The logged value that decides which checkpoint is the best."""

    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    readout: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the modules that make the outputs of the last hidden state; Muon leaves them to AdamW."""

    chosen: Chosen | None = None
    """Optimizer and scheduler that a configuration names by class, in place of the module's own."""

    compiled_networks: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the networks, or lists of networks, that every step calls and ``compile`` compiles; empty:
    ``model`` if there is one, else the module."""

    report: Any = None
    """Options of the test's report; None: there is none."""

    reporter: ClassVar[type[Any]]
    """The callback that ``report`` holds the options of."""

    reports: bool = True
    """Whether size, speed and the like are logged and the reports of ``report_callbacks`` made; not in a comparison."""

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default configs for constructor arguments that are None, by name.

        ``arguments`` are the given plain values. The command line writes the configs into a run's configuration.
        """
        return {"optimizer": OptimizerConfig()}

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        average_last: int | None = None,
        grow: GrowConfig | None = None,
        distil: DistilConfig | None = None,
    ) -> None:
        super().__init__()
        self.balance = StepBalance()
        check_values(Annotated[float, Bounds(0, 1, "()")] | None, ema_decay=ema_decay)
        check_values(Count | None, average_last=average_last)
        if ema_decay is not None and average_last is not None:
            raise ValueError(f"average_last={average_last} with ema_decay={ema_decay}: the weights have one average")
        self.optimizer_config = from_plain(optimizer, OptimizerConfig, "optimizer") or OptimizerConfig()
        grow, distil = from_plain(grow, GrowConfig, "grow"), from_plain(distil, DistilConfig, "distil")
        if distil is not None and type(self).distribution is SparseModule.distribution:
            raise ValueError(f"distil={distil}: {type(self).__name__} has no method distribution(batch) to compare by")
        if distil is not None and distil.copy and grow is not None:
            raise ValueError("distil.copy=True with grow: a training begins with the weights of one model")
        self.ema_decay, self.average_last, self.grow, self.distil = ema_decay, average_last, grow, distil
        self._teacher: Teacher | None = None
        self._frozen: Mapping[str, Sequence[int]] = {}
        self.adapted: Mapping[str, Any] | None = None
        self._stage_metrics = nn.ModuleDict()
        self._total_steps = math.inf
        self.num_trained = 0
        self._loss_sum: Tensor | float = 0.0

    @property
    def lr(self) -> float:
        """The peak learning rate. (Lightning's ``LearningRateFinder`` sets it.)"""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=value)
        _logger.info("learning rate set to %g", value)
        if "optimizer" in self.hparams:
            self.hparams["optimizer"] = to_plain(self.optimizer_config, OptimizerConfig)

    @property
    def test_monitor(self) -> str:
        """Return the name under which a test logs the monitored metric."""
        return f"test/{self.monitor.partition('/')[2]}"

    @property
    def module(self) -> Self:
        """Return the module that a trainer trains; a model of the user's own is asked by an object around it."""
        return self

    @property
    def task(self) -> Any:
        """The trained model in use, an ``apps.task.Task``: inputs and outputs."""
        return registry.task_of(type(self), "use")(self)

    @property
    def comparison(self) -> Any:
        """The model as a comparison sees it, an ``apps.equal_cost.comparison.Comparison``."""
        return registry.comparison_of(type(self))(self)

    # ---- for subclasses to define

    def task_loss(self, batch: Any) -> TaskOutput:
        """Return the loss of a batch, without the auxiliary loss of its MoE layers."""
        raise NotImplementedError(f"{type(self).__name__} must define task_loss(batch)")

    def distribution(self, batch: Any) -> Distribution:
        """Return the model's predictions for the targets of a batch, as the ``TaskOutput`` of a training has it."""
        raise NotImplementedError(f"{type(self).__name__} must define distribution(batch)")

    def judged(self, batch: Any, out: TaskOutput, stage: Stage) -> TaskOutput:
        """Return ``out`` with arguments of the metrics that ``task_loss`` does not give, such as decoded texts.

        Only validation and test call this; no pass in here counts as routing of the evaluation."""
        return out

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of ``forward`` in a batch, for predictions and for counting FLOPs."""
        raise NotImplementedError(f"{type(self).__name__} must define example_inputs(batch)")

    def infer(self, batch: Any) -> Any:
        """Run inference on a batch of the test: a pass, or the whole search of a decoder.

        ``moesaic test --sweep`` measures its speed.
        """
        return self(*self.example_inputs(batch))

    def cost_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return ``example_inputs`` without padding, which dense layers compute and experts do not, to count FLOPs."""
        return self.example_inputs(batch)

    def cost_unit(self, batch: Any) -> str:
        """Return the unit of the FLOPs of ``batch``: "an image", or with a length, "a block of 128 tokens"."""
        return "an example"

    def build_metrics(self) -> nn.Module | None:
        """Return a ``MetricCollection`` of (outputs, targets) without prefix, or a ``Metric`` that returns a dict of
        values by name, computed once a pass; None for only the loss."""
        return None

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Return the names, without the split, of metrics that progress bar and tables show next to the monitored one.

        A loss, an ``ece`` and an error are shown as they are, a share in percent.
        """
        return ()

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        """Return, by name, how a metric is made if its name does not tell; it is shown next to the values."""
        return {}

    def report_callbacks(self) -> list[Callback]:
        """Return the callbacks that report on a training or a test and change neither: ``reporter``, if ``report``."""
        return [] if self.report is None else [self.reporter(self.report)]

    # ---- steps

    def training_loss(self, batch: Any) -> TrainingLoss:
        """Return the loss that a step minimizes: the task's, with the teacher's part if there is a teacher, plus the
        weighted balance losses of all MoE layers."""
        with core.record(self) as tape:
            out = self.task_loss(batch)
        out = self._taught(batch, out)
        aux = core.aux_losses(tape)
        return TrainingLoss(self.balance.total(out.loss, aux, tape), out, aux, tape)

    def _taught(self, batch: Any, out: TaskOutput) -> TaskOutput:
        """Return ``out`` with the labels' loss and the teacher's in their shares."""
        if self._teacher is None:
            return out
        assert out.distribution is not None
        share, divergence = self._teacher.config.weight, self._teacher.divergence(out.distribution, batch)
        terms = {**out.terms, "label_loss": out.loss.detach(), "teacher_loss": divergence.detach()}
        return replace(out, loss=(1 - share) * out.loss + share * divergence, terms=terms)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        computed = self.training_loss(batch)
        self._log_step(computed)
        return computed.total

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers that change each step would recompile it
    def _log_step(self, computed: TrainingLoss) -> None:
        """Check and log the loss of a training step, and keep the experts' loads."""
        loss, out, aux, tape = computed
        terms = {"task loss": out.loss, **out.terms, **aux.terms}
        # Most steps log nothing: a call of log() costs as much as a tenth of a recommender's step.
        shown = logs_this_step(self) or self.trainer.is_last_batch
        self._loss_sum = self._loss_sum + loss.detach()  # reading it would make the host wait for a GPU
        if shown or not host_waits_for(loss.device):
            check_loss(self._loss_sum, terms, self.global_step + 1, self.optimizer_config.lr)
            self._loss_sum = 0.0
        self.balance.keep(tape)
        # Values are logged by step: Lightning does not save the running mean of an unfinished epoch.
        own = {"loss": out.loss.detach(), **{name: value.detach() for name, value in out.terms.items()}}
        if shown:
            own = self._mean_over_processes(own)
        task_loss = own.pop("loss")
        if shown:
            self.log("train/loss", task_loss, prog_bar=True, batch_size=out.num_examples)
        if logs_this_step(self):
            terms = {**{f"train/{name}": v for name, v in own.items()}, **self.balance.values(self, tape, aux)}
            self.log_dict(terms, batch_size=1)
        self.num_trained += out.num_examples

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the loss of a batch of the test, (), and its weight in the loss of the whole."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(*self.example_inputs(batch))

    def _evaluate(self, batch: Any, stage: Stage) -> dict[str, Any]:
        with core.record(self) as tape:
            out = self.task_loss(batch)
        self._log_evaluation(batch, out, tape, stage)
        return {"loss": out.loss.detach(), "weight": out.weight or out.num_examples}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log_evaluation(self, batch: Any, out: TaskOutput, tape: core.Tape, stage: Stage) -> None:
        out = self.judged(batch, out, stage)
        shown = {"prog_bar": stage == "val", "batch_size": out.weight or out.num_examples}
        metrics = self.stage_metrics(stage)
        if not getattr(metrics, "has_loss", False):
            self.log(f"{stage}/loss", out.loss, on_epoch=True, sync_dist=True, **shown)
        self.balance.count(tape)
        if metrics is not None:
            grouped = () if out.groups is None and out.cold is None else (out.groups,)
            metrics.update(out.outputs, out.targets, *grouped, *(() if out.cold is None else (out.cold,)))
            if hasattr(metrics, "items"):  # it is a collection of metrics of one value each
                self.log_dict(metrics, on_epoch=True, **shown)

    def stage_metrics(self, stage: Stage) -> Any:
        """Return the metrics of "val" or "test"; None if there are none."""
        return dict(self._stage_metrics.items()).get(stage)

    def _log_metrics(self, stage: Stage) -> None:
        """Compute and log a metric of many values; Lightning logs metrics of one value by itself."""
        metrics: Any = self.stage_metrics(stage)
        if metrics is None or hasattr(metrics, "items"):
            return
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        on_bar = {self.monitor, "val/loss", *(f"val/{name}" for name in self.shown_metrics)}
        # Every rank has the same values already; with sync_dist Lightning does not warn that they might differ.
        for shown in (True, False):
            part = {k: v for k, v in values.items() if (k in on_bar) == shown}
            self.log_dict(part, prog_bar=shown, sync_dist=True)
        metrics.reset()

    # ---- optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        config, chosen = self.optimizer_config, self.chosen
        if (trainer := trainer_of(self)) is not None:
            check_processes(self, trainer.world_size)
        precision = None if trainer is None else trainer.precision_plugin
        scales = isinstance(precision, MixedPrecision) and precision.scaler is not None
        builds = None if chosen is None or chosen.optimizer is None else chosen.build
        optimizer = build_optimizer(self, config, builds, fuses=not (scales and self.trainer.gradient_clip_val))
        if isinstance(precision, MixedPrecision) and not scales:
            # Under bf16-mixed a fused step has no gradients to unscale, which is why Lightning does not clip them.
            needs_no_unscaling(optimizer)
        hold(optimizer, self, self._frozen)
        if chosen is not None:
            return chosen.scheduled(optimizer, config.lr)
        # The state of a LambdaLR holds no plain function, so a resumed run follows its own flags.
        scheduler = LambdaLR(optimizer, lambda step: config.factor(step, self._total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        algorithm = gradient_clip_algorithm or "norm"
        if not (gradient_clip_val and clip_with_rows(parameters, gradient_clip_val, algorithm)):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # In on_train_batch_end it would be too late: Lightning calls the callbacks' hook, which may save, first.
        super().optimizer_step(*args, **kwargs)
        self.balance.update_biases(self)

    def on_train_start(self) -> None:
        # In configure_optimizers, asking for the number of steps would make Lightning set up the data loader before it
        # has read the checkpoint, and the loader's position would never be restored.
        self._total_steps = float(self.trainer.estimated_stepping_batches)
        restore_rates(self, self.optimizer_config)
        if self._teacher is not None:
            self._teacher.model.to(self.device, self.dtype)
        # Lightning saves that a callback ended the training, but never reads it: a resumed run would do another epoch.
        for callback in self.trainer.early_stopping_callbacks:
            if callback is not None and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                self.trainer.should_stop = True

    # ---- set-up and passes

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.grow is not None and self.starts_afresh:
            loader = getattr(self._data(), "val_dataloader", None)
            batches = loader() if loader is not None and self.grow.start == "copy" else None
            self._freeze(grow_from(self, self.grow, batches))
        if stage == "fit" and self.distil is not None:
            self._teacher = Teacher(self, self.distil)
        metrics: Any = self.build_metrics()
        if metrics is not None and not len(self._stage_metrics):
            for name in ("val", "test"):
                own = metrics.clone(prefix=f"{name}/") if hasattr(metrics, "items") else metrics.clone()
                self._stage_metrics[name] = own
        super().setup(stage)

    def _freeze(self, old_experts: Mapping[str, Sequence[int]]) -> None:
        """Freeze the experts that were there before the model grew, if it is to be so."""
        if self.grow is not None and self.grow.freeze:
            self._frozen = dict(old_experts)
            freeze(self, self._frozen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.chosen is not None:
            checkpoint["chosen_optimizer"] = self.chosen.name
        if self.adapted is not None:
            checkpoint["adapted"] = dict(self.adapted)
        if (form := form_of(self)) is not None:
            checkpoint["quantized"] = form
        if self._frozen:
            checkpoint["frozen_experts"] = {name: list(experts) for name, experts in self._frozen.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (trainer := trainer_of(self)) is not None and trainer.state.fn == "fit":
            there, here = checkpoint.get("chosen_optimizer"), None if self.chosen is None else self.chosen.name
            if there != here:
                own = "model.optimizer"
                raise ValueError(f"the checkpoint was trained by {there or own}, not by {here or own}: give that one")
        take_form(self, checkpoint)
        self._freeze(checkpoint.get("frozen_experts", {}))

    def configure_callbacks(self) -> list[Callback]:
        callbacks = super().configure_callbacks()
        if self.average_last is not None:
            callbacks.append(WeightAverage(self.average_last))
        if self.ema_decay is not None:
            callbacks.append(WeightEMA(self.ema_decay))
        return [*callbacks, ModelSize(), TrainingMeasures(), *self.report_callbacks()] if self.reports else callbacks

    def on_validation_epoch_start(self) -> None:
        self._start_pass("val")

    def on_validation_epoch_end(self) -> None:
        self._end_pass("val")

    def on_test_epoch_start(self) -> None:
        self._start_pass("test")

    def on_test_epoch_end(self) -> None:
        self._end_pass("test")

    def _start_pass(self, stage: Stage) -> None:
        self.balance.start_pass()
        if stage in self._stage_metrics:  # an interrupted pass leaves its part behind
            self._stage_metrics[stage].reset()  # type: ignore[operator]

    def _end_pass(self, stage: Stage) -> None:
        self._log_metrics(stage)
        self.balance.end_pass(self, stage)

    def _mean_over_processes(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each value, (), over processes with batches of the same size, in one collective."""
        if self.trainer.world_size == 1:
            return values
        mean = self.trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op="mean")
        return dict(zip(values, mean.unbind(), strict=True))
