"""The sections of a configuration: their types and defaults, as one tree of which model, data and trainer are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerTypeTuple
from torch.optim import Optimizer

from apps.cli.errors import UsageError, unknown_option
from apps.cli.flags import SECTIONS, with_flags
from apps.cli.values import Made, arguments, make, path_of, plain, read
from apps.train.compiling import CompileConfig
from apps.train.sparsified import SparsifyConfig

TRAINER_DEFAULTS = {
    "devices": 1,  # what divides a training, as configs/parallel does, names more
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,  # SparseModule logs the size, with the active parameters
}
"""Defaults that differ from those of Lightning's Trainer."""

_CHOSEN = {"optimizer": "params", "lr_scheduler": "optimizer"}
"""The first argument of a class that a section names, which is given when it is made."""

_VALUES: dict[str, tuple[Any, Any]] = {
    "seed_everything": (bool | int, 0),
    "trainer": (Trainer, None),
    "model": (LightningModule, None),
    "data": (LightningDataModule, None),
    "float32_matmul_precision": (Literal["highest", "high", "medium"], "high"),
    "threads": (int | None, None),
    "sparsify": (SparsifyConfig | None, None),
    "optimizer": (Optimizer | None, None),
    "lr_scheduler": (LRSchedulerTypeTuple[0] | LRSchedulerTypeTuple[1] | None, None),
    "lr_scheduler_interval": (Literal["epoch", "step"] | None, None),
    "ladder": (dict[str, Any] | None, None),
    "compile": (bool | CompileConfig | None, None),
}
"""Type and default of each section, in the order in which they are written."""


class Sections:
    """A configuration that has been read: every value has the type of its place, and no object is made yet.

    Args:
        config: plain values by section.

    Attributes:
        values: the values of each section, as ``apps.cli.values.read`` returns them.
        linked: arguments of the model that the data give.

    Raises:
        UsageError: naming the place, for a value of a wrong type, or an option or a class that does not exist.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        for name in config:
            if name not in _VALUES:
                raise UsageError(unknown_option(str(name), SECTIONS))
        for name, (hint, default) in _VALUES.items():
            if name == "trainer":
                given = arguments(Trainer, config.get(name) or {}, name, TRAINER_DEFAULTS)
                self.values[name] = Made(Trainer, given, is_named=False)
            elif name not in config:
                if name in ("model", "data"):
                    raise UsageError(
                        f"{name} missing: give a configuration, such as --config configs/vision/digits.yaml"
                    )
                self.values[name] = default
            else:
                self.values[name] = read(config[name], hint, name, default, [_CHOSEN[name]] if name in _CHOSEN else ())
        self.linked: tuple[str, ...] = tuple(getattr(self.values["model"].kind, "data_arguments", ()))

    def plain(self) -> dict[str, Any]:
        """Return the sections as plain values, without the arguments of the model that the data give."""
        return {name: plain(value) for name, value in self.values.items()}

    def changed(self, values: Mapping[str, Any]) -> Sections:
        """Return the sections with other values, by dotted name."""
        return Sections(with_flags(self.plain(), [f"--{name}={value}" for name, value in values.items()]))

    def make(
        self,
        data: Callable[..., LightningDataModule] | None = None,
        model: Callable[..., LightningModule] | None = None,
    ) -> dict[str, Any]:
        """Return the sections with their objects made, the data before the model; the trainer's are its arguments.

        Args:
            data, model: functions of the class and its arguments that make it; None: the class.
        """
        made: dict[str, Any] = {}
        for name, value in self.values.items():
            if name == "trainer":
                made[name] = make(value.arguments)
            elif name in _CHOSEN and value is not None:
                made[name] = {"class_path": path_of(value.kind), "init_args": make(value.arguments)}
            elif name not in ("model", "data"):
                made[name] = make(value)
        made["data"] = _made(self.values["data"], data, {})
        links = {name: getattr(made["data"], name) for name in self.linked}
        made["model"] = _made(self.values["model"], model, links)
        return made


def _made(section: Made, by: Callable[..., Any] | None, more: Mapping[str, Any]) -> Any:
    given = {**make(section.arguments), **section.further, **more}
    return section.kind(**given) if by is None else by(section.kind, **given)
