"""A LightningModule of the user's own, made sparse: the section ``sparsify`` of a configuration.

``core.sparsify`` replaces networks of the module. Then the module gets a subclass of its class that adds to each step
what MoE layers ask for; the user's own steps, optimizers and hooks stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import core
from apps.registry import name_of
from apps.train.checkpoint.contents import unlike
from apps.train.step.balance import StepBalance, balance_of, logs_this_step
from core.config.plain import arguments_from_plain, from_plain, to_plain
from core.convert import Start
from core.convert.build.starts import start_of
from core.fields import Checked, NotNegative

Step = Callable[..., Any]


@core.register_config
@dataclass(frozen=True)
class SparsifyConfig(Checked):
    """The feed-forward networks of a module that become MoE layers, and facts about it for a comparison.

    Attributes:
        modules: pattern of the networks' dotted names, or several: ``blocks.*.mlp``; see ``core.sparsify``.
        moe: the layers.
        start: how the experts are initialized: a name of ``core.convert.STARTS``, or a start with options.
        noise: relative standard deviation of normal noise on the experts' matrices.
        exact: a router whose gates would scale the outputs of the dense model raises an error.
        causal: the model is a causal decoder.
        seed: of gates, random experts and noise; None: it follows from ``seed_everything``.
        metric: name under which the module logs its quality in validation, such as ``val_acc``: it decides which
            checkpoint is the best, and a comparison compares it. None: the module's attribute ``monitor``.
        mode: whether a larger ("max") or a smaller ("min") metric is better; None: the module's ``monitor_mode``.
        test_metric: name of that metric in a test; None: the name in validation, with "test" for a "val" at its start.
        learning_rate: argument of the model's constructor that a comparison searches; None: ``lr`` or
            ``learning_rate``, whichever the constructor has.
        examples: key, index or attribute of a batch whose length, or value, is its number of examples; None: the
            common length of its tensors.

    Raises:
        ValueError: a mode that is neither, an unknown start, or one that reads values that no section gives.
    """

    prefix = "sparsify."

    modules: str | list[str]
    moe: core.MoEConfig
    start: str | Start = "copy"
    noise: NotNegative = 0.0
    exact: bool = True
    causal: bool = False
    seed: int | None = None
    metric: str | None = None
    mode: Literal["max", "min"] | None = None
    test_metric: str | None = None
    learning_rate: str | None = None
    examples: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = start_of(self.start).reads
        if reads:
            raise ValueError(f"sparsify.start={self.start} reads {reads}, which no section gives: call core.sparsify")


class SparsifiedModule(LightningModule):
    """Methods that ``adopt`` adds to a user's class: everything else in it is the user's.

    The balance losses are added to the loss that ``training_step`` returns, so that gradient accumulation and AMP scale
    them as they scale the task's.

    Attributes:
        sparsify_config: the section of the configuration.
        sparsify_arguments: plain arguments of the user's constructor, which a checkpoint keeps; None: the ``hparams``
            that the user's module saves.
        balance: the balance losses, selection biases and figures of the MoE layers.
    """

    balance: StepBalance
    predict: Callable[..., Any]
    sparsify_config: SparsifyConfig
    sparsify_arguments: Mapping[str, Any] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers that change each step would recompile it
    def balanced(self, result: Any, tape: core.Tape) -> Any:
        """Return a training step's result, with the balance losses added to its loss.

        Args:
            result: a loss (), a mapping with the key "loss", or None if the step skips its batch.
            tape: record of the layers' passes in the step.
        """
        aux = core.aux_losses(tape)
        if result is None:
            return None
        self.balance.keep(tape)
        if logs_this_step(self):
            self.log_dict(self.balance.values(self, tape, aux), batch_size=1)
        if isinstance(result, Tensor):
            return self.balance.total(result, aux, tape)
        if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
            return {**result, "loss": self.balance.total(result["loss"], aux, tape)}
        return result  # Lightning reports the error

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.balance.update_biases(self)

    def on_validation_epoch_start(self) -> None:
        self.balance.start_pass()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.balance.end_pass(self, "val")

    def on_validation_end(self) -> None:
        super().on_validation_end()
        metric, trainer = self.sparsify_config.metric, self.trainer
        if metric is not None and not trainer.sanity_checking and metric not in trainer.callback_metrics:
            # Otherwise no checkpoint would ever be the best, without a word.
            own = sorted(
                n for n in trainer.callback_metrics if "routing/" not in n and not n.startswith(("train/", "lr-"))
            )
            logged = ", ".join(own) or "nothing"
            raise ValueError(f"sparsify.metric={metric!r} is not what validation logs, which is {logged}")

    def on_test_epoch_start(self) -> None:
        self.balance.start_pass()
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.balance.end_pass(self, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sparsify"] = to_plain(self.sparsify_config, SparsifyConfig)
        checkpoint["module_class"] = name_of(type(self))
        if self.sparsify_arguments is not None:
            checkpoint["hyper_parameters"] = dict(self.sparsify_arguments)


def sparsified(module: LightningModule, config: SparsifyConfig) -> SparsifiedModule:
    """Return a copy of a LightningModule in which networks are MoE layers, and which trains them.

    Args:
        module: a module of the user's own, which has just been made; it stays as it is.
        config: the networks that become sparse, and how.

    Raises:
        ValueError: as ``core.sparsify`` and ``adopt``; or the module belongs to the suite, or optimizes by hand.
    """
    if balance_of(module) is not None:
        raise ValueError(
            f"sparsify is for a model of your own: {type(module).__name__} has MoE layers by its own options"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"sparsify: {type(module).__name__} optimizes by hand (automatic_optimization=False), so there is no "
            "returned loss that balance losses could be added to: use core.sparsify, core.record and core.aux_losses "
            "in your own training_step"
        )
    seed = int(torch.randint(2**31, ())) if config.seed is None else config.seed
    sparse = core.sparsify(
        module,
        config.moe,
        config.modules,
        config.start,
        noise=config.noise,
        seed=seed,
        exact=config.exact,
        causal=config.causal,
    )
    if not isinstance(sparse, LightningModule):
        raise ValueError(f"sparsify.modules={config.modules!r} names the whole model: name a part of it")
    return adopt(sparse, config)


def restored(kind: type[LightningModule], checkpoint: Mapping[str, Any], path: Any) -> SparsifiedModule:
    """Return the trained module of a user's class that a checkpoint of a module made sparse holds.

    Raises:
        ValueError: an argument or the section is not the class's, or the tensors are another model's.
    """
    arguments = arguments_from_plain(kind, checkpoint.get("hyper_parameters") or {}, f"{path}: model")
    module = sparsified(kind(**arguments), from_plain(checkpoint["sparsify"], SparsifyConfig, f"{path}: sparsify"))
    if detail := unlike(checkpoint["state_dict"], module):
        raise ValueError(f"{path} does not fit a {kind.__name__} of its arguments: {detail}")
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def adopt(module: LightningModule, config: SparsifyConfig) -> SparsifiedModule:
    """Give a module's class what ``SparsifiedModule`` adds to it, in place, and return the module.

    The new class has the name of the old one, and is its subclass, as with ``torch.distributed.fsdp.fully_shard``.

    Raises:
        ValueError: the module has an attribute with the name of one that is added, or nothing says whether more of the
            metric is better.
    """
    kind = type(module)
    for name in _added_names():
        if hasattr(module, name):
            raise ValueError(
                f"sparsify adds {name!r} to {kind.__name__}, which has an attribute of that name: rename it"
            )
    metric = config.metric or getattr(module, "monitor", None)
    mode = config.mode or getattr(module, "monitor_mode", None)
    if metric is not None and mode is None:
        raise ValueError(f"sparsify.mode is missing: max or min, whichever {metric} is best at")
    steps = {
        name: wrap(getattr(kind, name))
        for name, wrap in _WRAPPERS.items()
        if getattr(kind, name) is not getattr(LightningModule, name)  # Lightning asks whether a module has a step
    }
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (SparsifiedModule, kind), {**names, **steps})
    assert isinstance(module, SparsifiedModule)
    module.sparsify_config, module.balance = config, StepBalance()
    if metric is not None:
        module.monitor, module.monitor_mode = metric, mode  # type: ignore[assignment]
    return module


def check_sparsified(checkpoint: Mapping[str, Any], module: LightningModule, path: Any) -> None:
    """Raise a ``ValueError`` if a checkpoint's module was made sparse and this one was not, or the other way."""
    there, here = "sparsify" in checkpoint, isinstance(module, SparsifiedModule)
    if there and not here:
        raise ValueError(f"{path} holds a model that was made sparse: give the section sparsify of its configuration")
    if here and not there:
        raise ValueError(f"{path}: its {name_of(type(module))} was not made sparse: leave sparsify out")


def _added_names() -> Iterator[str]:
    """Yield the names that ``SparsifiedModule`` has beyond ``LightningModule``'s."""
    yield from (name for name in ("balance", *vars(SparsifiedModule)) if not hasattr(LightningModule, name))


def _training(step: Step) -> Step:
    @functools.wraps(step)
    def training_step(self: SparsifiedModule, *args: Any, **kwargs: Any) -> Any:
        with core.record(self) as tape:
            result = step(self, *args, **kwargs)
        return self.balanced(result, tape)

    return training_step


def _evaluation(step: Step) -> Step:
    @functools.wraps(step)
    def evaluation_step(self: SparsifiedModule, *args: Any, **kwargs: Any) -> Any:
        with core.record(self) as tape:
            result = step(self, *args, **kwargs)
        self.balance.count(tape)
        return result

    return evaluation_step


_WRAPPERS = {"training_step": _training, "validation_step": _evaluation, "test_step": _evaluation}
