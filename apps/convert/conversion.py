"""What a conversion is given and makes: the new model's arguments, and the tensors of some modules, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import core
from apps.convert.runs import Run
from apps.train.step.module import SparseModule

Statistics = Mapping[str, core.ExpertStatistics]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """A converted model that is to be written.

    Attributes:
        arguments: of its constructor.
        replaced: by the dotted name of a module, or of one tensor, what makes the new tensors by their names below it;
            "" is the tensor itself. All other tensors stay as they are.
        data: arguments of the data that change.
        extra: further entries of the checkpoint.
    """

    arguments: dict[str, Any]
    replaced: Mapping[str, Callable[[], Tensors]]
    data: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def values(self, state: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the new model with its name, those that stay first."""
        for name, value in state.items():
            if self.owner(name) is None:
                yield name, value
        for prefix, make in self.replaced.items():
            yield from _named(prefix, make)

    def layout(self, run: Run, outline: SparseModule) -> dict[str, Tensor]:
        """Return tensors without contents of the shapes and dtypes of the new model.

        Args:
            run: the run that is converted.
            outline: the new model.

        Raises:
            ValueError: a tensor that stays is not the new model's.
        """
        places: dict[Any, Tensor] = {}
        old, layout = run.state, {}
        floats = {value.dtype for value in old.values() if value.is_floating_point()}
        for name, new in outline.state_dict().items():
            if not isinstance(new, Tensor):
                continue
            if self.owner(name) is not None:
                # A run of one precision keeps it.
                dtype = next(iter(floats)) if new.is_floating_point() and len(floats) == 1 else new.dtype
                layout[name] = torch.empty(new.shape, dtype=dtype)
                continue
            value = old.get(name)
            if value is None or value.shape != new.shape:
                there = "missing" if value is None else tuple(value.shape)
                raise ValueError(f"the converted model has {name} of {tuple(new.shape)}, and {run.file} {there}")
            # Tied tensors stay one.
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
            layout[name] = places.setdefault(key, torch.empty(value.shape, dtype=value.dtype))
        lost = next((name for name in old if name not in layout and self.owner(name) is None), None)
        if lost is not None:
            raise ValueError(f"the converted model has no place for {lost} of {run.file}")
        return layout

    def owner(self, name: str) -> str | None:
        """Return the replaced module or tensor that a name belongs to; None: it stays."""
        return next((p for p in self.replaced if name == p or name.startswith(f"{p}.")), None)


def _named(prefix: str, make: Callable[[], Tensors]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one module by their full names; none of them outlives this call."""
    for name, value in make().items():
        yield f"{prefix}.{name}" if name else prefix, value.detach()


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how.

    Attributes:
        run: the run.
        module: its model, with tensors that are mapped; a user's own is in memory.
        options: the command line, with the options of the kind.
        statistics: of the experts, by layer; None: no batches were asked for, or the kind reads none.
        others: further runs, to be merged.
    """

    run: Run
    module: Any
    options: Any
    statistics: Statistics | None = None
    others: tuple[Run, ...] = ()
