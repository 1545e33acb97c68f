"""Optimizers and schedulers that a configuration names by class, with LightningCLI's sections."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau, instantiate_class
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from apps.train.lightning_internals import is_overridden

SECTIONS = ("optimizer", "lr_scheduler", "lr_scheduler_interval")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The classes and values that the sections ``optimizer``, ``lr_scheduler`` and ``lr_scheduler_interval`` name.

    Attributes:
        optimizer: ``class_path`` and ``init_args`` of an optimizer; None: the module's own.
        scheduler: the same for a scheduler; None: the rate of ``optimizer`` stays as it is.
        interval: when the scheduler steps.
    """

    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    interval: str

    @classmethod
    def of(cls, sections: Mapping[str, Any]) -> Chosen | None:
        """Return what parsed sections name; None if they name nothing."""
        optimizer, scheduler = (_plain(sections.get(name)) for name in SECTIONS[:2])
        return cls(optimizer, scheduler, sections.get(SECTIONS[2]) or "epoch") if optimizer or scheduler else None

    def take_place_in(self, module: LightningModule) -> None:
        """Make a module train by these classes.

        A module with an ``optimizer_config`` calls them with its own parameter groups; any other gives all its
        parameters, as under LightningCLI.

        Raises:
            ValueError: a scheduler without an optimizer, for a module that brings its own.
        """
        if hasattr(module, "optimizer_config"):
            module.chosen = self  # type: ignore[assignment]
            if self.optimizer is not None:
                own: dict[str, Any] = {"name": "adamw", "fused": False, "weight_decay": 0.0, **self.rates}
                config: Any = module.optimizer_config
                module.optimizer_config = replace(config, **own)
            return
        kind = type(module).__name__
        if self.optimizer is None:
            raise ValueError(f"lr_scheduler is for a given optimizer, and {kind} has its own: give optimizer too")
        if is_overridden("configure_optimizers", module):
            _logger.warning("%s replaces configure_optimizers of %s", self.optimizer["class_path"], kind)
        module.configure_optimizers = MethodType(  # type: ignore[method-assign]
            lambda own: self.scheduled(self.build([{"params": list(own.parameters())}]), self.rates.get("lr")), module
        )

    @property
    def name(self) -> str | None:
        """Return the class path of the optimizer; None: it is the module's own."""
        return None if self.optimizer is None else str(self.optimizer["class_path"])

    @property
    def rates(self) -> dict[str, float]:
        """Return the learning rate and the weight decay, if the optimizer has them."""
        given = {} if self.optimizer is None else self.optimizer["init_args"]
        return {name: given[name] for name in ("lr", "weight_decay") if given.get(name) is not None}

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer of parameter groups.

        Raises:
            ValueError: it does not take them, such as LBFGS, which takes one group.
        """
        assert self.optimizer is not None
        known = {"name", "params", *self.rates}
        groups = [{k: v for k, v in group.items() if k in known} for group in groups]
        return _made(groups, self.optimizer, "optimizer")  # type: ignore[no-any-return]

    def scheduled(self, optimizer: Optimizer, lr: float | None) -> dict[str, Any]:
        """Return the optimizer with its schedule, as ``configure_optimizers`` does.

        Args:
            optimizer: the optimizer.
            lr: the rate of which its groups' rates are multiples; None: it has none.

        Raises:
            ValueError: the scheduler rejects an option, or names no metric though it needs one.
        """
        if self.scheduler is None:
            return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: 1.0)}
        arguments = dict(self.scheduler["init_args"])
        for name in ("max_lr", "base_lr"):  # one number would give all groups the same rate
            if lr and isinstance(arguments.get(name), (int, float)):
                arguments[name] = [arguments[name] * group["lr"] / lr for group in optimizer.param_groups]
        scheduler = _made(optimizer, {**self.scheduler, "init_args": arguments}, "lr_scheduler")
        monitored = {"monitor": scheduler.monitor} if isinstance(scheduler, ReduceLROnPlateau) else {}
        if not monitored and isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                f"lr_scheduler={self.scheduler['class_path']} names no metric: give lr_scheduler=ReduceLROnPlateau, "
                "Lightning's, and lr_scheduler.monitor, such as val/loss"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, **monitored},
        }


def is_torchs(section: str, value: Any) -> bool:
    """Return whether a value of a section names a class of torch's, with plain numbers and words: nothing is imported.

    Args:
        section: a name of ``SECTIONS``.
        value: plain values from a file that is not trusted.
    """
    if section == "lr_scheduler_interval" or value is None:
        return value in (None, "epoch", "step")
    if not isinstance(value, Mapping) or value.keys() - {"class_path", "init_args"}:
        return False
    home = torch.optim if section == "optimizer" else torch.optim.lr_scheduler
    module, _, name = str(value.get("class_path")).rpartition(".")
    is_plateau = (module, name) == (ReduceLROnPlateau.__module__, ReduceLROnPlateau.__name__)
    if not (is_plateau and section == "lr_scheduler") and (module != home.__name__ or name not in home.__all__):
        return False
    arguments = value.get("init_args") or {}
    return isinstance(arguments, Mapping) and all(map(_is_plain, arguments.values()))


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a word without dots, which names no function, or a list of these."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float)) or bool(re.fullmatch(r"[\w/-]+", str(value)))


def _plain(section: Any) -> dict[str, Any] | None:
    """Return a parsed section as plain values; None: it names nothing."""
    if not section:
        return None
    plain = section.as_dict() if hasattr(section, "as_dict") else dict(section)
    return {"class_path": plain["class_path"], "init_args": plain.get("init_args") or {}}


def _made(first: Any, section: Mapping[str, Any], name: str) -> Any:
    try:
        return instantiate_class(first, section)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}={section['class_path']}: {error}") from error
