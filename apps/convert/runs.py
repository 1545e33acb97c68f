"""A trained run as a conversion reads it, and the folder of the new run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from apps.base.files import delete, temporary_path
from apps.cli.configs import merge, read_config
from apps.convert.streaming import write_checkpoint
from apps.registry import name_of
from apps.train.checkpoint.contents import read_checkpoint, unlike
from apps.train.checkpoint.loading import check_beside, module_class
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.checkpoint.run_folder import mark
from apps.train.step.adapted import adapt_linears
from apps.train.step.module import SparseModule
from core.config.plain import arguments_from_plain, arguments_to_plain

KEPT = ("pytorch-lightning_version", "hparams_name", "module_class", "encoding")
"""Entries of a checkpoint that a converted one keeps: the optimizer's state and the steps are the old model's."""
_STARTS = ("pretrained", "grow", "distil")
"""Arguments that name other models to begin with, which a converted model does not."""
CONFIG = "config.yaml"
WEIGHTS = Path("checkpoints") / "best.ckpt"


@dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
        file: its checkpoint.
        checkpoint: the contents, whose tensors are mapped and not read yet.
        kind: class of the model.
        config: configuration that lies beside it, or that the user has named; None: there is none.
    """

    file: Path
    checkpoint: Mapping[str, Any]
    kind: type[SparseModule]
    config: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path, config: Path | None = None, shapes_only: bool = False) -> Run:
        """Read a run's folder or a checkpoint.

        Args:
            path: the folder or the checkpoint.
            config: a configuration in place of that beside the checkpoint.
            shapes_only: of sharded tensors read the shapes alone; the model is not to be changed.

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

    @property
    def is_own(self) -> bool:
        """Whether the model is a user's own, which the section ``sparsify`` made sparse."""
        return "sparsify" in self.checkpoint

    @property
    def is_adapted(self) -> bool:
        """Whether there are updates beside linear layers, which ``moesaic convert adapt`` has made."""
        return "adapted" in self.checkpoint

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the model, by name."""
        return {name: value for name, value in self.checkpoint["state_dict"].items() if isinstance(value, Tensor)}

    def arguments(self, overlay: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments of the model without other models to begin with.

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
            contents: of a checkpoint, which may name updates beside linear layers; None: there are none.
        """
        with torch.device("meta"):
            module = self.kind(**arguments)
        adapt_linears(module, contents or {})
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

    def written_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments as the plain values of a checkpoint and a configuration."""
        return arguments_to_plain(self.kind, arguments)


def model_section(overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's arguments that a configuration gives."""
    section = overlay.get("model") or {}
    given = section.get("init_args", section) if isinstance(section, Mapping) else {}
    return {name: value for name, value in (given or {}).items() if name != "class_path"}


@contextlib.contextmanager
def new_run(output: Path) -> Iterator[Path]:
    """Make a folder beside ``output``, and move it there once the block has ended without an error."""
    temporary = temporary_path(output)
    delete(temporary)  # a kill has left it
    try:
        (temporary / WEIGHTS.parent).mkdir(parents=True)
        mark(temporary)
        yield temporary
        if output.exists():
            raise ValueError(f"{output} has appeared meanwhile: it stays as it is")
        temporary.rename(output)
    except BaseException:
        with contextlib.suppress(OSError):
            delete(temporary)
        raise


def write_run(
    folder: Path,
    run: Run,
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
        arguments: those of the converted model; None: they stay, and so does the model of the configuration.
        layout, values: as in ``write_checkpoint``.
        data: arguments of the data that change in the configuration.
        extra: further entries of the checkpoint; ``converted`` says what made it, and ``sparsify`` is the section of
            the configuration too.
        run_dir: where the folder will be.

    Raises:
        OSError: it cannot be written.
    """
    stays = run.checkpoint.get("hyper_parameters") or {}
    plain = stays if arguments is None else run.written_arguments(arguments)
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
            config["data"] = merge(config["data"], {"init_args": dict(data)})
        config["run_dir"] = str(run_dir)
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    return file
