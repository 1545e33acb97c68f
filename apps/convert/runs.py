"""A trained run as a conversion reads it, its conversion, and the new run.

The new checkpoint is laid out first and then filled through a memory map: besides the source, which is mapped too, one
tensor or one converted layer is in memory at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import core
from apps.base.files import folder_beside, naming
from apps.base.progress import bar
from apps.cli.configs import merge, read_config
from apps.registry import name_of
from apps.train.checkpoint.contents import read_checkpoint, unlike
from apps.train.checkpoint.loading import check_beside, module_class
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.checkpoint.run_folder import mark
from apps.train.step.adapted import take_form
from apps.train.step.module import SparseModule
from core.config.plain import arguments_from_plain, arguments_to_plain


def write_checkpoint(
    path: Path, rest: Mapping[str, Any], layout: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a checkpoint whose tensors are made one after another.

    Args:
        path: the file, in a folder that exists.
        rest: the contents beside ``state_dict``.
        layout: tensors of any contents for the ``state_dict``; names with one tensor share it in the file.
        values: the value of each name; all names occur.

    Raises:
        OSError: the file cannot be written, as on a full disk.
        ValueError: a value has another shape than the layout.
    """
    mapped = laid_out(path, {**rest, "state_dict": dict(layout)})
    fill({name: value for name, value in mapped.items() if name != "state_dict"}, rest)
    with bar("writing the new model", sum(map(_num_bytes, layout.values()))) as shown:
        for name, value in values:
            place = mapped["state_dict"][name]
            if place.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, and its place {tuple(place.shape)}")
            place.copy_(value)
            del value  # before the next one is made
            shown.advance(_num_bytes(place))
    sync(path)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def laid_out(path: Path, contents: Mapping[str, Any]) -> Any:
    """Write a file of contents whose tensors have no values yet, and return it mapped: values copied to a tensor are
    written.

    Args:
        path: the file, in a folder that exists.
        contents: plain values, and tensors of any contents on the CPU.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    with naming(path):
        try:
            with torch.serialization.skip_data():
                torch.save(dict(contents), path)
        except RuntimeError as error:  # torch does not say why its zip file cannot be written
            raise OSError(f"cannot write {path}: the disk may be full") from error
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                # The file has holes so far: a full disk has to show here, and not in a write through the map.
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def fill(places: Any, values: Any) -> None:
    """Copy each tensor of nested values to its place in values of the same form, which may have further tensors."""
    if isinstance(values, Tensor):
        places.copy_(values)
    elif isinstance(values, Mapping):
        for name, value in values.items():
            fill(places[name], value)
    elif isinstance(values, (list, tuple)):
        for place, value in zip(places, values, strict=True):
            fill(place, value)


KEPT = ("pytorch-lightning_version", "hparams_name", "module_class", "encoding")
"""Entries of a checkpoint that a converted one keeps: the optimizer's state and the steps are the old model's."""
_STARTS = ("pretrained", "grow", "distil")
"""Arguments that name other models to start with, which a converted model does not."""
CONFIG = "config.yaml"
WEIGHTS = Path("checkpoints") / "best.ckpt"


@dataclass(frozen=True)
class TrainedRun:
    """A trained run.

    Attributes:
        file: its checkpoint.
        checkpoint: the contents, whose tensors are mapped and not read yet.
        kind: class of the model.
        config: configuration that lies next to it, or that the user has named; None: there is none.
    """

    file: Path
    checkpoint: Mapping[str, Any]
    kind: type[SparseModule]
    config: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path, config: Path | None = None, shapes_only: bool = False) -> TrainedRun:
        """Read a run's folder or a checkpoint.

        Args:
            path: the folder or the checkpoint.
            config: a configuration to use instead of the one next to the checkpoint.
            shapes_only: of sharded tensors read only the shapes; the model is not to be changed.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, or of an unknown model.
        """
        file = find_checkpoint(path)
        checkpoint = read_checkpoint(file, shapes_only)
        if "module_class" not in checkpoint:
            raise ValueError(
                f"{file} is of no model of the suite: convert a model of your own in a script, by core.sparsify, "
                "core.average_states and their like (docs/your_model.md)"
            )
        beside = file.parent.parent / CONFIG
        values = read_config(config) if config is not None else read_config(beside) if beside.is_file() else None
        if config is None and values is not None:
            values, left_out = check_beside(values, beside)
            if left_out:
                print(f"configuration: {beside}; left out: {', '.join(left_out)} (--config takes all)", file=sys.stderr)
        return cls(file, checkpoint, module_class(checkpoint, file), values)

    def check_data(self, batches: int) -> None:
        """Raise a ``ValueError`` if batches are asked for, and no configuration names the data."""
        if batches and self.config is None:
            raise ValueError(f"no {CONFIG} lies beside {self.file}: give --config FILE, or --batches 0")

    @property
    def is_own(self) -> bool:
        """Whether the model is a user's own, which the section ``sparsify`` made sparse."""
        return "sparsify" in self.checkpoint

    @property
    def is_adapted(self) -> bool:
        """Whether there are adapters on linear layers, which ``moesaic convert adapt`` has made."""
        return "adapted" in self.checkpoint

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the model, by name."""
        return {name: value for name, value in self.checkpoint["state_dict"].items() if isinstance(value, Tensor)}

    def arguments(self, overlay: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments of the model without other models to start with.

        Args:
            overlay: a configuration whose model section is laid over them.

        Raises:
            ValueError: a value that the model does not take.
        """
        plain = dict(self.checkpoint.get("hyper_parameters") or {})
        plain |= {name: None for name in _STARTS if name in plain}
        if overlay is not None:
            plain = merge(plain, model_section(overlay))
        return arguments_from_plain(self.kind, plain, f"{self.file}: model")

    def outline(self, arguments: Mapping[str, Any], contents: Mapping[str, Any] | None = None) -> SparseModule:
        """Return a model on the meta device: it has shapes, and no values.

        Args:
            arguments: of its constructor.
            contents: of a checkpoint, which may name adapters on linear layers and how experts are quantized; None:
                neither.
        """
        with torch.device("meta"):
            module = self.kind(**arguments)
        take_form(module, contents or {})
        return module

    def mapped(self) -> SparseModule:
        """Return the trained model with its tensors mapped from the file, which is not for running.

        Raises:
            ValueError: the file has other tensors than the model.
        """
        module = self.outline(self.arguments(), self.checkpoint)
        problem = unlike(self.checkpoint["state_dict"], module)
        if problem:
            raise ValueError(f"{self.file} does not fit a {self.kind.__name__} of its arguments: {problem}")
        module.load_state_dict(self.checkpoint["state_dict"], assign=True)
        return module.eval()


def model_section(overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's arguments that a configuration gives."""
    section = overlay.get("model") or {}
    given = section.get("init_args", section) if isinstance(section, Mapping) else {}
    return {name: value for name, value in (given or {}).items() if name != "class_path"}


@contextlib.contextmanager
def new_run(output: Path) -> Iterator[Path]:
    """Make a folder next to ``output``, and move it there once the block has ended without an error."""
    with folder_beside(output) as folder:
        (folder / WEIGHTS.parent).mkdir(parents=True)
        mark(folder)
        yield folder
        if output.exists():
            raise ValueError(f"{output} has appeared meanwhile: it stays as it is")
        folder.rename(output)


def write_run(
    folder: Path,
    run: TrainedRun,
    arguments: Mapping[str, Any] | None,
    layout: Mapping[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
    *,
    data: Mapping[str, Any],
    extra: Mapping[str, Any],
    run_dir: Path,
) -> Path:
    """Write a converted run, and return its checkpoint.

    Args:
        folder: the new run's folder.
        run: the run that was converted.
        arguments: the converted model's; None: they stay, and so does the model of the configuration.
        layout, values: as in ``write_checkpoint``.
        data: arguments of the data that change in the configuration.
        extra: further entries of the checkpoint; ``converted`` says what made it, and ``sparsify`` is the section of
            the configuration too.
        run_dir: path of the new folder.

    Raises:
        OSError: it cannot be written.
    """
    stays = run.checkpoint.get("hyper_parameters") or {}
    plain = stays if arguments is None else arguments_to_plain(run.kind, arguments)
    kept = {name: run.checkpoint[name] for name in KEPT if name in run.checkpoint}
    if run.is_own and "sparsify" not in extra:
        kept.pop("module_class", None)
    rest = {**kept, "epoch": 0, "global_step": 0, "hyper_parameters": plain, **extra}
    file = folder / WEIGHTS
    write_checkpoint(file, rest, layout, values)
    if run.config is not None:
        config = {name: value for name, value in run.config.items() if name not in ("ckpt_path", "sparsify")}
        config |= {"sparsify": extra["sparsify"]} if "sparsify" in extra else {}
        if arguments is not None:
            config["model"] = {"class_path": name_of(run.kind), "init_args": plain}
        if data and isinstance(config.get("data"), Mapping):
            config["data"] = {**config["data"], "init_args": {**(config["data"].get("init_args") or {}), **data}}
        config["run_dir"] = str(run_dir)
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


Statistics = Mapping[str, core.ExpertStatistics]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """A converted model that is to be written.

    Attributes:
        arguments: of its constructor.
        replaced: by the dotted name of a module, or of one tensor, a function that makes the new tensors by their names
            below it; "" is the tensor itself. All other tensors stay as they are.
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

    def layout(self, run: TrainedRun, outline: SparseModule) -> dict[str, Tensor]:
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
class ConversionRequest:
    """The input and options of a conversion.

    Attributes:
        run: the run.
        module: its model, with tensors that are mapped; a user's own is in memory.
        options: the command line, with the options of the kind.
        statistics: of the experts, by layer; None: no batches were asked for, or the kind reads none.
        others: further runs, to be merged.
    """

    run: TrainedRun
    module: Any
    options: Any
    statistics: Statistics | None = None
    others: tuple[TrainedRun, ...] = ()
