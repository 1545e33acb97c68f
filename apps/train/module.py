"""What every app's LightningModule shares: the auxiliary loss, the optimizer, the log of the routing, and the guards.

An app subclasses ``SparseModule`` and brings a network, a task loss and metrics; everything here is the same for
images, users and sentences.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import core
from apps.train import sharded
from apps.train.averaging import WeightAverage, WeightEMA
from apps.train.cost import measure_cost, megaflops
from apps.train.finite import check_loss
from apps.train.optimizers import OptimizerConfig, build_optimizer, parameter_groups

_logger = logging.getLogger(__name__)

Stage = Literal["train", "val", "test"]


@dataclass(frozen=True)
class TaskOutput:
    """What an app's ``task_loss`` returns.

    Attributes:
        loss: (), the mean over the examples, without any auxiliary loss.
        outputs: what the metrics compare, such as logits (B, C).
        targets: what they compare it with.
        num_examples: B.
        weight: of this batch in an epoch's mean, such as its tokens; None: ``num_examples``.
        terms: parts of the loss to log, each (); empty where the loss is one term.
        groups: int64 (B,), whose example it is, for metrics by user: a third argument of their ``update``; None: none.
    """

    loss: Tensor
    outputs: Any
    targets: Any
    num_examples: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None
    weight: int | None = None


class SparseModule(LightningModule):
    """A LightningModule for a network that may have MoE layers.

    A subclass brings ``forward``, ``task_loss`` and ``example_inputs``, and may bring ``build_metrics``. The weighted
    auxiliary loss of all MoE layers is added to the loss that ``training_step`` returns, so that gradient accumulation
    and AMP scale it as they scale the task's.

    Args:
        optimizer: learning rate, weight decay and schedule.
        ema_decay: decay of an exponential moving average of the weights; validation, test and the weights in a
            checkpoint are then the average. None: no average.
        average_last: also write ``average.ckpt``, the mean of the weights at the ends of so many last epochs; a
            comparison tests that one. None: no such file.

    Raises:
        ValueError: ema_decay outside (0, 1), average_last below 1, or both.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()
    """Constructor parameters that the command line fills with the data module's attribute of the same name."""

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configs that stand in for constructor arguments that are None, by name.

        The command line writes them out, so that a run's configuration says what was in force.

        Args:
            arguments: the plain values that were given, by name.
        """
        return {"optimizer": OptimizerConfig()}

    monitor: ClassVar[str] = "val/loss"
    """The logged value that decides which checkpoint is the best."""

    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    readout: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the modules that read the outputs off the last hidden state; Muon leaves them to AdamW."""

    aux_weight: float = 1.0
    """Of the layers' weighted losses beside the task's loss."""

    starts_afresh: bool = True
    """The weights are still those it was made with. Who is to load a checkpoint says so by False."""

    _encoding: Mapping[str, Any] | None = None
    """What the numbers of the data stand for, as the checkpoint says; None: no checkpoint says it."""

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        average_last: int | None = None,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1")
        if average_last is not None and average_last < 1:
            raise ValueError(f"average_last={average_last} must be at least 1")
        if ema_decay is not None and average_last is not None:
            raise ValueError(f"average_last={average_last} with ema_decay={ema_decay}: the weights have one average")
        self.optimizer_config = optimizer or OptimizerConfig()
        self.ema_decay, self.average_last = ema_decay, average_last
        # Lightning gathers the arguments of the subclass's constructor from here. Plain dicts, or a checkpoint could
        # not be loaded with weights_only.
        self.save_hyperparameters(logger=False)
        taken = inspect.signature(type(self).__init__).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        # Without those of this constructor alone, which the subclass could not be made anew with.
        self._arguments = {k: v for k, v in self.hparams.items() if every or k in taken}
        plain = {k: to_plain(v) for k, v in self._arguments.items()}
        self.hparams.clear()
        self._set_hparams(plain)
        self._hparams_initial = dict(plain)
        self._stage_metrics = nn.ModuleDict()
        self._tape: core.Tape | None = None
        self._stats: core.RoutingStats | None = None
        self._total_steps = math.inf
        self._clock = _Clock()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.starts_afresh = False
        return super().load_state_dict(*args, **kwargs)

    # ---- what a subclass brings

    def task_loss(self, batch: Any) -> TaskOutput:
        """The loss of a batch, without the auxiliary loss of its MoE layers."""
        raise NotImplementedError(f"{type(self).__name__} must define task_loss(batch)")

    def judged(self, batch: Any, out: TaskOutput, stage: Stage) -> TaskOutput:
        """``out`` with what the metrics compare where ``task_loss`` does not give it, such as decoded texts.

        Called in validation and test alone; no pass in here counts as routing of the evaluation."""
        return out

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of ``forward`` in a batch: what FLOPs are counted and predictions made with."""
        raise NotImplementedError(f"{type(self).__name__} must define example_inputs(batch)")

    def cost_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return ``example_inputs`` without padding: FLOPs are counted on these, and dense layers compute padding
        while experts do not."""
        return self.example_inputs(batch)

    def cost_unit(self, batch: Any) -> str:
        """What the FLOPs of an example of ``batch`` are of: "an image", or with a length where the data decide it, "a
        block of 128 tokens"."""
        return "an example"

    def build_metrics(self) -> nn.Module | None:
        """A torchmetrics ``MetricCollection`` of (outputs, targets), without prefix, or one ``Metric`` that returns a
        dict of values by name, computed once a pass; None: the loss alone."""
        return None

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Metrics that are shown beside the monitored one, on the progress bar and in tables: names without the split,
        such as ``("auc_click", "auc_buy")``. A loss, an ``ece`` and an error are shown as they are, a share in percent.
        """
        return ()

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        """How metrics are made, by name, where their name alone does not tell: stands beside their values."""
        return {}

    def twin(self, **changed: Any) -> Self:
        """Return the module anew, untrained, with other values of the arguments in ``changed``."""
        return type(self)(**{**self._arguments, **changed})

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with core.record(self) as tape:
            out = self.task_loss(batch)
        aux = core.aux_losses(tape)
        loss = out.loss + self.aux_weight * aux.total if len(tape) else out.loss
        terms = {"task loss": out.loss, **out.terms, **aux.terms}
        check_loss(loss, terms, self.global_step + 1, self.optimizer_config.lr)
        # The loads alone: logits and scores of every micro-batch would stay until the optimizer's step.
        self._tape = tape.loads() if self._tape is None else self._tape.merge(tape.loads())
        # Logged by step, never as an epoch's mean: Lightning does not save the running mean of an unfinished epoch.
        own = {"loss": out.loss.detach(), **{name: value.detach() for name, value in out.terms.items()}}
        # Not at each step: a call of log() costs as much as a tenth of a recommender's step.
        shown = self._logs_this_step() or self.trainer.is_last_batch
        if shown:
            own = self._mean_over_processes(own)
        task_loss = own.pop("loss")
        if shown:
            self.log("train/loss", task_loss, prog_bar=True, batch_size=out.num_examples)
        if self._logs_this_step():
            terms = {f"train/{name}": value for name, value in {**own, **aux.terms}.items()}
            if core.moe_layers(self):  # not by the tape: all ranks take part in the sums
                terms["train/aux_loss"] = aux.total
                terms |= routing_metrics(core.RoutingStats.from_tape(tape).all_reduce())
            self.log_dict({k: v.detach() for k, v in terms.items()}, batch_size=1)
        self._clock.add(out.num_examples)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(*self.example_inputs(batch))

    def _evaluate(self, batch: Any, stage: Stage) -> None:
        with core.record(self) as tape:
            out = self.task_loss(batch)
        out = self.judged(batch, out, stage)
        shown = {"prog_bar": stage == "val", "batch_size": out.weight or out.num_examples}
        self.log(f"{stage}/loss", out.loss, on_epoch=True, sync_dist=True, **shown)
        if len(tape):
            stats = core.RoutingStats.from_tape(tape)
            self._stats = stats if self._stats is None else self._stats + stats
        if stage in self._stage_metrics:
            metrics: Any = self._stage_metrics[stage]
            metrics.update(out.outputs, out.targets, *(() if out.groups is None else (out.groups,)))
            if hasattr(metrics, "items"):  # a collection of metrics of one value each
                self.log_dict(metrics, on_epoch=True, **shown)

    def stage_metrics(self, stage: Stage) -> Any:
        """The metrics of "val" or "test", as ``build_metrics`` made them; None where there are none."""
        return dict(self._stage_metrics.items()).get(stage)

    def _log_metrics(self, stage: Stage) -> None:
        """A metric of many values is computed here, once; Lightning logs metrics of one value by itself."""
        metrics: Any = self.stage_metrics(stage)
        if metrics is None or hasattr(metrics, "items"):
            return
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        on_bar = {self.monitor, *(f"val/{name}" for name in self.shown_metrics)}
        # Every rank has the same values already; with sync_dist Lightning does not warn that they might differ.
        for shown in (True, False):
            some = {k: v for k, v in values.items() if (k in on_bar) == shown}
            self.log_dict(some, prog_bar=shown, sync_dist=True)
        metrics.reset()

    def _log_stats(self, stage: Stage) -> None:
        """The figures of the whole pass: the imbalance of the sum over batches and ranks, not a mean of imbalances."""
        stats, self._stats = self._stats, None
        if stats is None and not core.moe_layers(self):
            return
        # A rank without a batch takes part in the sums.
        stats = (stats or core.RoutingStats({})).all_reduce()
        if stats.layers:
            # Every rank has the same figures already; with sync_dist Lightning does not warn that they might differ.
            self.log_dict(routing_metrics(stats, prefix=f"{stage}/routing"), sync_dist=True)

    # ---- optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.optimizer_config
        optimizer = build_optimizer(self, config)
        # A plain function: the state of a LambdaLR holds none, so a resumed run follows its own flags.
        scheduler = LambdaLR(optimizer, lambda step: config.factor(step, self._total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here and not in on_train_batch_end: Lightning calls the callbacks' hook, which may save, before the module's.
        super().optimizer_step(*args, **kwargs)
        tape, self._tape = self._tape, None
        if tape is not None:  # also where it is empty: other ranks may have passes, and wait
            core.update_expert_bias(self, tape)

    def on_train_start(self) -> None:
        # Not in configure_optimizers: asking for the number of steps there makes Lightning set up the data loader
        # before it has read the checkpoint, and the loader's position is then never restored.
        self._total_steps = float(self.trainer.estimated_stepping_batches)
        self._restore_own_rates()
        # Lightning saves that a callback ended the training, but reads it not: resumed, it would do another epoch.
        for callback in self.trainer.early_stopping_callbacks:
            if callback is not None and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                self.trainer.should_stop = True
        self._clock.restart()

    def _restore_own_rates(self) -> None:
        """Set the rates of the step ahead: resuming loads the old run's with the optimizer, but this run's count."""
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(scheduler, LambdaLR):
            return
        wanted = {g["name"]: g for g in parameter_groups(self, self.optimizer_config)}
        config = self.optimizer_config
        for group in optimizer.param_groups:
            own = wanted.get(group.get("name"))
            if own is None:
                continue
            group.update(initial_lr=own["lr"], weight_decay=own["weight_decay"], betas=config.betas, eps=config.eps)
            if "momentum" in group:
                group["momentum"] = config.muon_momentum
            group["lr"] = own["lr"] * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]

    # ---- set-up and log

    def _data(self) -> Any:
        """The trainer's data module; None without one."""
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)

    def _hand_over(self) -> None:
        """Give the data the encoding that the checkpoint keeps, and refuse data that do not fit the model.

        Data that have ``encoding_state`` and ``adopt`` encode by it, whatever their own rows would have taught.
        """
        adopt = getattr(self._data(), "adopt", None)
        if adopt is not None and self._encoding is not None:
            adopt(self._encoding)
        self._check_data()

    def _check_data(self) -> None:
        """Refuse data that do not fit the model, with a ``ValueError``."""
        self._check_data_arguments()

    def _check_data_arguments(self) -> None:
        """Refuse data that say otherwise of ``data_arguments`` than the model's attributes of these names."""
        for name in self.data_arguments:
            found = getattr(self._data(), name, None)
            if found is not None and found != getattr(self, name):
                raise ValueError(f"model.{name}={getattr(self, name)} does not fit the data, whose {name} is {found}")

    def setup(self, stage: str) -> None:
        metrics: Any = self.build_metrics()
        if metrics is not None and not len(self._stage_metrics):
            for name in ("val", "test"):
                own = metrics.clone(prefix=f"{name}/") if hasattr(metrics, "items") else metrics.clone()
                self._stage_metrics[name] = own
        self._hand_over()

    def configure_callbacks(self) -> list[Callback]:
        if self.average_last is not None:
            return [WeightAverage(self.average_last)]
        return [WeightEMA(self.ema_decay)] if self.ema_decay is not None else []

    def on_train_epoch_start(self) -> None:
        self._clock.restart()

    def on_validation_epoch_start(self) -> None:
        self._clock.pause()
        self._start_pass("val")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")
        self._log_stats("val")
        self._clock.resume()

    def on_test_epoch_start(self) -> None:
        self._start_pass("test")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")
        self._log_stats("test")

    def _start_pass(self, stage: Stage) -> None:
        self._stats = None
        if stage in self._stage_metrics:  # a pass that was broken off leaves its part behind
            self._stage_metrics[stage].reset()  # type: ignore[operator]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"
        state = getattr(self._data(), "encoding_state", self._encoding)
        if state is not None:
            checkpoint["encoding"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._encoding = checkpoint.get("encoding")
        if self._data() is not None:
            self._hand_over()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the module of a checkpoint, with the weights that a test uses; ``kwargs`` beat what it remembers.

        Raises:
            ValueError: the checkpoint names a class that is not registered.
        """
        shards = sharded.read(checkpoint_path) if sharded.is_sharded(checkpoint_path) else None
        checkpoint = shards or torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        remembered = {k: from_plain(v) for k, v in checkpoint.get("hyper_parameters", {}).items()}
        if "_instantiator" in remembered:  # Lightning would import what it names
            raise ValueError(f"{checkpoint_path} names a function to be made with, which no checkpoint of ours does")
        if shards is not None:
            module = cls(*args, **{**remembered, **kwargs})
            module.load_state_dict(shards["state_dict"])
            module._encoding = shards.get("encoding")  # Lightning's hooks are not called here
            return module
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **remembered, **kwargs})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 0 and batch_idx == 0:
            self._log_size(batch)
            self._clock.restart()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0 and self._clock.examples:
            self.log("train/examples_per_second", self._clock.rate() * self.trainer.world_size, batch_size=1)

    def _log_size(self, batch: Any) -> None:
        """Parameters, active parameters and forward FLOPs an example, once a run: what a comparison counts too."""
        counted = self._validation_batch()
        cost = measure_cost(self, batch if counted is None else counted)
        elsewhere = getattr(self.trainer.strategy, "num_params_elsewhere", 0)
        size = {
            "num_params": cost.num_params + elsewhere,
            "active_params": cost.active_params + elsewhere,
            "flops_per_example": cost.flops_per_example,
        }
        for logger in self.loggers:
            logger.log_metrics({f"model/{k}": float(v) for k, v in size.items()}, step=0)
        if rank_zero_only.rank == 0:
            _logger.info(
                "%s: %s parameters, %s active, %s MFLOPs %s (forward)",
                type(self).__name__,
                f"{size['num_params']:,}",
                f"{size['active_params']:,}",
                megaflops(cost.flops_per_example),
                cost.unit,
            )

    def _validation_batch(self) -> Any:
        """The first batch of the validation, which costs are counted on; None where there is none."""
        loader: Any = self.trainer.val_dataloaders
        while isinstance(loader, (list, tuple)):
            loader = next(iter(loader), None)
        if loader is None or isinstance(loader, Mapping):
            return None
        with torch.random.fork_rng(devices=[]):  # a pass over a loader draws a seed for its workers
            batch = next(iter(loader), None)
        if batch is None:
            return None
        return self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))

    def _logs_this_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _mean_over_processes(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each (), of batches of the same size; one collective for all."""
        if self.trainer.world_size == 1:
            return values
        mean = self.trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op="mean")
        return dict(zip(values, mean.unbind(), strict=True))


class _Clock:
    """Seconds of training and the examples trained on in them; validation and checkpoints do not count."""

    def __init__(self) -> None:
        self.examples, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def restart(self) -> None:
        self.examples, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def add(self, examples: int) -> None:
        self.examples += examples

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def rate(self) -> float:
        """Examples a second since the last call."""
        seconds = self._seconds + time.perf_counter() - self._since
        rate = self.examples / seconds if seconds > 0 else 0.0
        self.restart()
        return rate


def routing_metrics(stats: core.RoutingStats, prefix: str = "routing") -> dict[str, Tensor]:
    """The figures of each layer, ``{prefix}/{layer}/{figure}``, and their means, ``{prefix}/{figure}``."""
    metrics: dict[str, Tensor] = {}
    figures: dict[str, list[float]] = {}
    for layer, layer_stats in stats.layers.items():
        for name, value in layer_stats.figures().items():
            metrics[f"{prefix}/{layer}/{name}"] = torch.tensor(value)
            figures.setdefault(name, []).append(value)
    metrics |= {f"{prefix}/{name}": torch.tensor(sum(v) / len(v)) for name, v in figures.items()}
    return metrics


def to_plain(value: Any) -> Any:
    """Return ``value`` as plain dicts, lists and numbers; a dataclass as ``{"class_path": ..., "init_args": ...}``.

    Raises:
        ValueError: a dataclass that is not registered: ``from_plain`` could not make it again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        if not core.is_registered(type(value)):
            raise ValueError(f"no checkpoint can be loaded with a {path}: decorate the class with core.register_config")
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": path, "init_args": fields}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def from_plain(value: Any) -> Any:
    """Return what ``to_plain`` made ``value`` of, with the config dataclasses of class_path back; lists stay lists.

    Raises:
        ValueError: a class_path that is not registered (``core.register_config``), or arguments that its class refuses.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {k: from_plain(v) for k, v in value.items()}
    kind = core.registered_config(value["class_path"])
    try:
        return kind(**{k: from_plain(v) for k, v in value["init_args"].items()})
    except TypeError as error:
        raise ValueError(f"class_path={value['class_path']!r}: {error}") from error
