"""What every app's LightningModule shares: the auxiliary loss, the optimizer, the log of the routing, and the guards.

An app subclasses ``SparseModule`` and brings a network, a task loss and metrics; everything here is the same for
images, users and sentences.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import core
from apps.callbacks import NonFiniteError, WeightEMA

_logger = logging.getLogger(__name__)

Stage = Literal["train", "val", "test"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with one learning rate for three kinds of parameters, a linear warm-up and a cosine decay, both by step.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled weight decay; biases, norms and other 1-d parameters have none.
        betas: decay rates of Adam's two moments.
        eps: added to the root of the second moment.
        router_lr_scale: the routers' learning rate is ``lr`` times this.
        router_weight_decay_scale: the routers' weight decay is ``weight_decay`` times this.
        expert_lr_scale: the experts' learning rate is ``lr`` times this.
        expert_weight_decay_scale: the experts' weight decay is ``weight_decay`` times this.
        warmup: steps of linear warm-up; a fraction of all steps where it is below 1.
        schedule: what follows the warm-up: "cosine" to ``min_lr_ratio``, or "constant".
        min_lr_ratio: learning rate at the end, as a part of the peak.

    Raises:
        ValueError: a value outside its range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    router_lr_scale: float = 1.0
    router_weight_decay_scale: float = 1.0
    expert_lr_scale: float = 1.0
    expert_weight_decay_scale: float = 1.0
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list in YAML and in a checkpoint
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr} must be positive")
        for name in (
            "weight_decay",
            "eps",
            "router_lr_scale",
            "router_weight_decay_scale",
            "expert_lr_scale",
            "expert_weight_decay_scale",
            "warmup",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be two numbers in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optimizer.schedule={self.schedule!r} is not one of 'cosine', 'constant'")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"optimizer.warmup={self.warmup} must be a whole number of steps, or a fraction below 1")

    def warmup_steps(self, total_steps: float) -> int:
        """Steps of warm-up in a run of ``total_steps`` (``inf`` where it has no end)."""
        if self.warmup >= 1:
            return int(self.warmup)
        return round(self.warmup * total_steps) if math.isfinite(total_steps) else 0

    def factor(self, step: int, total_steps: float) -> float:
        """The learning rate of optimizer step ``step`` (from 0) as a part of the peak."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant" or not math.isfinite(total_steps):
            return 1.0
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TaskOutput:
    """What an app's ``task_loss`` returns.

    Attributes:
        loss: (), the mean over the examples, without any auxiliary loss.
        outputs: what the metrics compare, such as logits (B, C).
        targets: what they compare it with.
        num_examples: B, the weight of this batch in an epoch's mean.
        terms: parts of the loss to log, each (); empty where the loss is one term.
    """

    loss: Tensor
    outputs: Any
    targets: Any
    num_examples: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A model that ``moesaic compare`` trains beside the sparse one.

    Attributes:
        build: makes it, untrained; None where it cannot exist or coincides with another.
        note: what it is, or why there is none.
    """

    build: Callable[[], SparseModule] | None
    note: str = ""


class SparseModule(LightningModule):
    """A LightningModule for a network that may have MoE layers.

    A subclass brings ``forward``, ``task_loss`` and ``example_inputs``, and may bring ``build_metrics`` and
    ``baselines``. The weighted auxiliary loss of all MoE layers is added to the loss that ``training_step`` returns, so
    that gradient accumulation and AMP scale it as they scale the task's.

    Args:
        optimizer: learning rate, weight decay and schedule.
        ema_decay: decay of an exponential moving average of the weights; validation, test and the weights in a
            checkpoint are then the average. None: no average.

    Raises:
        ValueError: ema_decay outside (0, 1).
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()
    """Constructor parameters that the command line fills with the data module's attribute of the same name."""

    monitor: ClassVar[str] = "val/loss"
    """The logged value that decides which checkpoint is the best."""

    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, optimizer: OptimizerConfig | None = None, ema_decay: float | None = None) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1")
        self.optimizer_config = optimizer or OptimizerConfig()
        self.ema_decay = ema_decay
        # Lightning gathers the arguments of the subclass's constructor from here. Plain dicts, or a checkpoint could
        # not be loaded with weights_only.
        self.save_hyperparameters(logger=False)
        plain = {k: to_plain(v) for k, v in self.hparams.items()}
        self._set_hparams(plain)
        self._hparams_initial = dict(plain)
        self._stage_metrics = nn.ModuleDict()
        self._tape: core.Tape | None = None
        self._stats: core.RoutingStats | None = None
        self._total_steps = math.inf
        self._clock = _Clock()

    # ---- what a subclass brings

    def task_loss(self, batch: Any) -> TaskOutput:
        """The loss of a batch, without the auxiliary loss of its MoE layers."""
        raise NotImplementedError(f"{type(self).__name__} must define task_loss(batch)")

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of ``forward`` in a batch: what FLOPs are counted and predictions made with."""
        raise NotImplementedError(f"{type(self).__name__} must define example_inputs(batch)")

    def build_metrics(self) -> nn.Module | None:
        """A torchmetrics ``MetricCollection`` of (outputs, targets), without prefix; None: the loss alone."""
        return None

    def baselines(self) -> Mapping[str, Baseline]:
        """The models to compare this one with, by name."""
        return {}

    moe_config: core.MoEConfig | None = None
    """The MoE layers' configuration, for a comparison of routers; None: there is none."""

    moe_dim: int = 0
    """Width D of the tokens that reach the MoE layers."""

    moe_flops_arguments: Mapping[str, int] = {}
    """Further arguments of ``MoEConfig.flops_per_token`` at these layers, such as the length of a sequence."""

    context_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of ``core.RoutingContext`` that the model gives its MoE layers, beside ``valid_BS``."""

    def with_moe(self, moe: core.MoEConfig) -> SparseModule:
        """The same model, untrained, with other MoE layers."""
        raise NotImplementedError(f"{type(self).__name__} must define with_moe(moe) for a comparison of routers")

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with core.record(self) as tape:
            out = self.task_loss(batch)
        aux = core.aux_losses(tape)
        loss = out.loss + aux.total if len(tape) else out.loss
        self._check_finite(loss, {"task loss": out.loss, **out.terms, **aux.terms})
        kept = tape.detach()
        self._tape = kept if self._tape is None else self._tape.merge(kept)
        # Logged by step, never as an epoch's mean: Lightning does not save the running mean of an unfinished epoch.
        self.log("train/loss", out.loss, prog_bar=True, batch_size=out.num_examples)
        if self._logs_this_step():
            terms = {f"train/{name}": value for name, value in {**out.terms, **aux.terms}.items()}
            if len(tape):
                terms["train/aux_loss"] = aux.total
                terms |= routing_metrics(core.RoutingStats.from_tape(kept))
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
        shown = {"prog_bar": stage == "val", "batch_size": out.num_examples}
        self.log(f"{stage}/loss", out.loss, on_epoch=True, sync_dist=True, **shown)
        if len(tape):
            stats = core.RoutingStats.from_tape(tape.detach())
            self._stats = stats if self._stats is None else self._stats + stats
        if stage in self._stage_metrics:
            metrics = self._stage_metrics[stage]
            metrics.update(out.outputs, out.targets)  # type: ignore[operator]
            self.log_dict(metrics, on_epoch=True, **shown)

    def _log_stats(self, stage: Stage) -> None:
        """The figures of the whole pass: the imbalance of a sum, not a mean of the batches' imbalances."""
        stats, self._stats = self._stats, None
        if stats is not None:
            self.log_dict(routing_metrics(stats, prefix=f"{stage}/routing"), sync_dist=True)

    # ---- optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            parameter_groups(self, config), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
        )
        # A plain function: the state of a LambdaLR holds none, so a resumed run follows its own flags.
        scheduler = LambdaLR(optimizer, lambda step: config.factor(step, self._total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here and not in on_train_batch_end: Lightning calls the callbacks' hook, which may save, before the module's.
        super().optimizer_step(*args, **kwargs)
        tape, self._tape = self._tape, None
        if tape is not None and len(tape):
            core.update_expert_bias(self, tape)

    def on_train_start(self) -> None:
        # Not in configure_optimizers: asking for the number of steps there makes Lightning set up the data loader
        # before it has read the checkpoint, and the loader's position is then never restored.
        self._total_steps = float(self.trainer.estimated_stepping_batches)
        self._restore_own_rates()
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
            group["lr"] = own["lr"] * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]

    # ---- set-up and log

    def setup(self, stage: str) -> None:
        metrics = self.build_metrics()
        if metrics is not None and not len(self._stage_metrics):
            for name in ("val", "test"):
                self._stage_metrics[name] = metrics.clone(prefix=f"{name}/")  # type: ignore[operator]

    def configure_callbacks(self) -> list[Callback]:
        return [WeightEMA(self.ema_decay)] if self.ema_decay is not None else []

    def on_train_epoch_start(self) -> None:
        self._clock.restart()

    def on_validation_epoch_start(self) -> None:
        self._clock.pause()
        self._stats = None

    def on_validation_epoch_end(self) -> None:
        self._log_stats("val")
        self._clock.resume()

    def on_test_epoch_start(self) -> None:
        self._stats = None

    def on_test_epoch_end(self) -> None:
        self._log_stats("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The module of a checkpoint, with the weights that a test uses; ``kwargs`` beat what it remembers."""
        hparams = torch.load(checkpoint_path, map_location="cpu", weights_only=True).get("hyper_parameters", {})
        remembered = {k: from_plain(v) for k, v in hparams.items()}
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **remembered, **kwargs})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 0 and batch_idx == 0:
            self._log_size(batch)
            self._clock.restart()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0 and self._clock.examples:
            self.log("train/examples_per_second", self._clock.rate() * self.trainer.world_size, batch_size=1)

    def _log_size(self, batch: Any) -> None:
        """Parameters, active parameters and forward FLOPs an example, once a run."""
        size = model_size(self, self.example_inputs(batch))
        for logger in self.loggers:
            logger.log_metrics({f"model/{k}": float(v) for k, v in size.items()}, step=0)
        if rank_zero_only.rank == 0:
            _logger.info(
                "%s: %s parameters, %s active, %.2f MFLOPs an example (forward)",
                type(self).__name__,
                f"{size['num_params']:,}",
                f"{size['active_params']:,}",
                size["flops_per_example"] / 1e6,
            )

    def _logs_this_step(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _check_finite(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        # Waits for the device each step: a few percent on a GPU, for an error at the step that caused it.
        if bool(torch.isfinite(loss)):
            return
        values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in terms.items())
        raise NonFiniteError(
            f"the training loss is {float(loss.detach())} at step {self.global_step + 1} ({values}); "
            f"no checkpoint holds it. Try a lower model.optimizer.lr (now {self.optimizer_config.lr:g}), a longer "
            "warmup, trainer.gradient_clip_val=1.0, or trainer.precision=32-true"
        )


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


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as AdamW groups: routers, experts, the rest, each with and without decay.

    No decay for 1-d parameters, biases (also the experts', which are (E, F)), and what a submodule names in
    ``no_weight_decay()`` as timm's models do. A group has the keys ``name``, ``params``, ``lr`` and ``weight_decay``;
    empty groups are left out.
    """
    kind: dict[int, str] = {}
    for layer in core.moe_layers(model).values():
        kind |= dict.fromkeys(map(id, layer.router.parameters()), "router")
        kind |= dict.fromkeys(map(id, layer.experts.parameters()), "experts")
    exempt = set(_no_weight_decay(model))
    scales = {
        "router": (config.router_lr_scale, config.router_weight_decay_scale),
        "experts": (config.expert_lr_scale, config.expert_weight_decay_scale),
        "rest": (1.0, 1.0),
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        which = kind.get(id(parameter), "rest")
        leaf = name.rpartition(".")[2]
        decays = parameter.ndim > 1 and not (name in exempt or "bias" in leaf or leaf.startswith("b_"))
        key = which if decays else f"{which}_no_decay"
        lr_scale, decay_scale = scales[which]
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr": config.lr * lr_scale,
                "weight_decay": config.weight_decay * decay_scale if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _no_weight_decay(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            yield from (f"{prefix}.{n}" if prefix else n for n in names())


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


def model_size(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, float]:
    """``num_params``, ``active_params`` and the forward ``flops_per_example``, counted on ``inputs``.

    The generators and the model's mode are as before.
    """
    batch = next((len(x) for x in inputs if isinstance(x, Tensor)), 1)
    training = model.training
    devices = [inputs[0].device.index] if isinstance(inputs[0], Tensor) and inputs[0].is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        flops = core.count_flops(model, *inputs)
        model.train(training)
    return {
        "num_params": sum(p.numel() for p in model.parameters()),
        "active_params": core.active_params(model),
        "flops_per_example": flops / batch,
    }


def to_plain(value: Any) -> Any:
    """``value`` as plain dicts, lists and numbers; a dataclass as ``{"class_path": ..., "init_args": ...}``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def from_plain(value: Any) -> Any:
    """What ``to_plain`` made its argument of, with the config dataclasses of class_path back; lists stay lists.

    Raises:
        ValueError: a class_path that is no dataclass of this environment.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {k: from_plain(v) for k, v in value.items()}
    module, _, name = value["class_path"].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"class_path={value['class_path']!r} cannot be imported") from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"class_path={value['class_path']!r} is not a config dataclass")
    return kind(**{k: from_plain(v) for k, v in value["init_args"].items()})
