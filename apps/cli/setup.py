"""Model, data and trainer of ``moesaic fit|validate|test|predict``, as a request's configuration names them.

The user's words win, flags over files and later files over earlier ones; other options come from the checkpoint, then
from the constructors. A checkpoint whose tensors do not fit raises an error that names the options that differ.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.plugins.io import CheckpointIO

from apps.base.messages import excerpt
from apps.cli.checkpoint import check_fits
from apps.cli.classes import with_short_names
from apps.cli.configs import at, read_config
from apps.cli.errors import UsageError
from apps.cli.experts import ChangesExperts
from apps.cli.flags import Word
from apps.cli.request import Request
from apps.cli.sections import Sections
from apps.registry import differences, name_of
from apps.report.base import FOLDER
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.resume import GeneratorState
from apps.train.checkpoint.run_folder import OF_USERS, check_free, check_unlinked
from apps.train.compiling import compile_networks
from apps.train.cost.offloading import room_for_experts
from apps.train.cost.quantizing import form_of
from apps.train.device import device_options, set_matmul_precision
from apps.train.optim.chosen import SECTIONS as SECTIONS_OF_OPTIMIZER, Chosen
from apps.train.sparsified import sparsified
from apps.train.step.adapted import take_form
from apps.train.step.measures import TrainingMeasures
from apps.train.step.module import SparseModule
from apps.train.watch.logs import EventLog, MetricsCSV, profiler
from apps.train.watch.progress import progress
from core.config.plain import from_plain, to_plain


class RunSetup:
    """What a command runs, made of a request's configuration by the constructor.

    Attributes:
        sections: the configuration, read.
        model, datamodule, trainer: what it makes.
        made: the other sections, with their objects.
        compiled: a line on what is compiled, or None.
        run_dir, ckpt_path: folder of the run, and its checkpoint.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run_dir = request.run_dir
        self.ckpt_path = request.checkpoint
        self.experts = ChangesExperts(*(getattr(request.options, name, None) for name in ("quantize", "offload")))
        if request.command == "fit":  # before anything slow
            check_free(self.run_dir)
        check_unlinked(p for p in self.run_dir.glob("*") if request.command == "fit" or p.name in (FOLDER, "profile"))
        with request.naming_origins():
            self.sections = Sections(request.config)
            self._seed()
            self._make()

    def _seed(self) -> None:
        """Seed the generators, unless ``seed_everything`` is false; true draws a seed."""
        seed = self.sections.values["seed_everything"]
        if seed is not False:
            self.sections.values["seed_everything"] = seed_everything(None if seed is True else seed, workers=True)

    def _make(self) -> None:
        """Make data, model and trainer, and give the model what its checkpoint has."""
        self.made = self.sections.make(self._create_data, self._create_model)
        self.datamodule, self.model = self.made.pop("data"), self.made.pop("model")
        section = self.made["sparsify"]
        if section is not None:
            self.model = sparsified(self.model, section)
            self.model.sparsify_arguments = self.sections.plain()["model"]["init_args"]
        self.compiled = train_as_given(self.model, self.made)
        self.trainer = self._create_trainer()
        check_links(self.request, self.sections, self.datamodule)
        if self.request.exported is not None:
            self.request.exported.attach(self.model)
        elif self.ckpt_path is not None and self.request.loaded is not None:
            self._check_fits(self.request.loaded, self.ckpt_path)
            if self.request.command == "fit":
                self._check_optimizer(self.ckpt_path)
            self.model.starts_afresh = False  # Lightning loads the checkpoint only after the model's setup
        elif self.request.weights is not None:
            self._begin_with(self.request.weights)

    def _check_fits(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Give the model the parts that its checkpoint has, and raise an error if the checkpoint does not fit."""
        if isinstance(self.model, SparseModule):
            take_form(self.model, checkpoint)
        check_fits(checkpoint, self.model, path)

    def _check_optimizer(self, path: Path) -> None:
        """Raise a ``UsageError`` for values of an optimizer or a scheduler that the loaded states would override.

        Without a scheduler of torch's, a ``SparseModule`` takes its own values when it resumes.
        """
        beside = path.parent.parent / "config.yaml"
        there, here = read_config(beside) if beside.is_file() else None, self.plain_config()
        scheduled = there is not None and (there.get("lr_scheduler") or here.get("lr_scheduler"))
        if there is None or (isinstance(self.model, SparseModule) and not scheduled):
            return
        for name in ("model.optimizer", *SECTIONS_OF_OPTIMIZER):
            keys = name.split(".")
            for option, former, value in differences(at(there, keys), at(here, keys), name):
                raise UsageError(
                    f"{option}={excerpt(value)} is {excerpt(former)} in {beside}, which a resumed run keeps: give it, "
                    "or start a new run with --weights"
                )

    def _begin_with(self, path: Path) -> None:
        """Load the weights of a checkpoint, from which a new training starts."""
        checkpoint: Mapping[str, Any] = read_checkpoint(path)
        encoding_state = getattr(self.datamodule, "encoding_state", None)
        same_class = checkpoint.get("module_class") == name_of(type(self.model))
        if encoding_state is not None and same_class and hasattr(self.model, "widened"):
            checkpoint = self.model.widened(checkpoint, encoding_state)
        self._check_fits(checkpoint, path)
        form = form_of(self.model)
        if form is not None:
            raise UsageError(f"weights={path} has experts in {form}, which do not train: give those of its run")
        self.model.on_load_checkpoint(checkpoint)
        self.model.load_state_dict(checkpoint["state_dict"])

    def _create_data(self, kind: type[LightningDataModule], **arguments: Any) -> LightningDataModule:
        """Make the data, with the checkpoint's encoding before the model takes its arguments from them."""
        data = kind(**arguments)
        adopt, checkpoint = getattr(data, "adopt", None), self.request.loaded or self.request.start_checkpoint or {}
        model = self.request.model_class
        own = None if model is None else name_of(model)
        if self.request.weights is not None:
            adopt = getattr(data, "extend", adopt)
        if adopt is not None and "encoding" in checkpoint and checkpoint.get("module_class") == own:
            adopt(checkpoint["encoding"])
        return data

    def _create_model(self, kind: type[LightningModule], **arguments: Any) -> LightningModule:
        """Make the model, without weights if a graph runs in their place, or a checkpoint's go to a file."""
        if self.request.exported is not None:
            with torch.device("meta"):
                return kind(**arguments)
        # Other strategies move or divide a model before its checkpoint is read.
        loads_first = self.sections.values["trainer"].arguments["strategy"] in ("auto", "ddp")
        is_filled = self.ckpt_path is not None and issubclass(kind, LinkedModule) and loads_first
        with room_for_experts(self.experts.offload if is_filled else None):
            return kind(**arguments)

    def _create_trainer(self) -> Trainer:
        given = self.made["trainer"]
        if given.get("default_root_dir") is not None:
            raise UsageError(
                f"trainer.default_root_dir={given['default_root_dir']} would split the run: give --run_dir, which is "
                "the one folder of its files"
            )
        kwargs = {**given, "default_root_dir": str(self.run_dir), **device_options(given)}
        set_matmul_precision(kwargs, self.made["float32_matmul_precision"])
        callbacks = self._callbacks(given.get("callbacks") or [])
        defaults: list[Callback] = [GeneratorState(), self.experts]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            defaults.append(progress(self.request.command))
            kwargs["enable_progress_bar"] = isinstance(defaults[-1], ProgressBar)
        if given.get("enable_checkpointing") is not False and not given.get("fast_dev_run"):
            if not any(isinstance(c, BestAndLast) for c in callbacks):
                defaults.append(BestAndLast(str(self.run_dir / "checkpoints")))
        elif not (given.get("fast_dev_run") and any(isinstance(c, Checkpoint) for c in callbacks)):
            kwargs["enable_checkpointing"] = False
        if self.request.command == "fit" and not isinstance(self.model, SparseModule):  # it brings its own
            defaults.append(TrainingMeasures())
        kwargs["callbacks"] = [*callbacks, *defaults]
        kwargs["logger"] = self._loggers(given.get("logger"))
        if isinstance(given.get("profiler"), str):
            kwargs["profiler"] = profiler(given["profiler"], self.run_dir / "profile")
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO(mapped=self.request.command != "fit")]
        return Trainer(**kwargs)

    def _callbacks(self, given: Any) -> list[Callback]:
        """Return the user's callbacks; ``ModelCheckpoint`` has a folder of its own in the run's."""
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = callback.dirpath or os.path.realpath(self.run_dir / OF_USERS)
                if callback.dirpath == os.path.realpath(self.run_dir / "checkpoints"):
                    raise UsageError(
                        f"trainer.callbacks: dirpath={callback.dirpath} of {type(callback).__name__} is the folder of "
                        "the run's own best.ckpt and last.ckpt: give another, or leave it out"
                    )
            if isinstance(callback, BatchSizeFinder) and getattr(self.datamodule, "batch_size", 0) is None:
                kind = type(self.datamodule).__name__
                raise UsageError(
                    f"trainer.callbacks: BatchSizeFinder tries batch sizes, and {kind} counts a batch in tokens: give "
                    "data.tokens_per_batch"
                )
        return sorted(callbacks, key=lambda c: isinstance(c, BestAndLast))  # last.ckpt keeps the state of the others

    def _loggers(self, given: Any) -> Any:
        """Return the trainer's loggers: ``metrics.csv``, which reports read, and TensorBoard's or the user's."""
        if given is False:
            return False
        if given in (None, True):
            if self.request.command != "fit":  # a test must not touch the log of the training
                return False
            names = {"name": "tensorboard", "version": "", "monitor": getattr(self.model, "monitor", "val/loss")}
            given = [EventLog(str(self.run_dir), default_hp_metric=False, **names)]
        loggers = list(given) if isinstance(given, (list, tuple)) else [given]
        if self.request.command != "fit" or any(isinstance(logger, MetricsCSV) for logger in loggers):
            return loggers
        return [MetricsCSV(str(self.run_dir)), *loggers]

    def plain_config(self) -> dict[str, Any]:
        """Return the configuration in force as plain values."""
        config = self.sections.plain()
        for name in self.request.from_checkpoint:  # a run that was stopped is described as an unbroken one
            config["data"]["init_args"][name] = None
        for name in getattr(self.datamodule, "places", ()):
            config["data"]["init_args"][name] = getattr(self.datamodule, name)
        return {"run_dir": str(self.run_dir), **shown(config)}


def shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain sections with short names, and without those that are null."""
    no_part = {name for name in (*SECTIONS_OF_OPTIMIZER, "compile", "threads", "sparsify") if config.get(name) is None}
    return with_short_names({k: v for k, v in config.items() if k not in no_part})


def train_as_given(module: LightningModule, sections: Mapping[str, Any]) -> str | None:
    """Give a module the optimizer that parsed sections name, compile its networks, and return the line of the latter.

    Raises:
        ValueError: as ``Chosen.take_place_in``, or the interval of no scheduler.
    """
    chosen = Chosen.of(sections)
    if chosen is not None:
        chosen.take_place_in(module)
    return compile_networks(module, sections.get("compile"))


def check_links(request: Request, sections: Sections, data: LightningDataModule) -> None:
    """Raise a ``UsageError`` if the configuration has another value for an argument that the data decides."""
    for name in sections.linked:
        option = f"model.{name}"
        value = at(request.config, ("model", name))
        value = yaml.safe_load(value) if isinstance(value, Word) else value
        attribute: Any = getattr(data, name, None)
        plain = to_plain(attribute, type(attribute))
        if isinstance(value, Mapping) and isinstance(plain, Mapping):
            # A run of an earlier version lacks the fields that have come since; another thing is compared as it is.
            with contextlib.suppress(ValueError):
                value = to_plain(from_plain(value, type(attribute), option), type(attribute))
        differing = None if value is None else next(differences(value, plain, option), None)
        if differing is not None:
            where, written_value, own = differing
            what = where.removeprefix("model.")
            if hasattr(attribute, "digest") and isinstance(value, Mapping):  # too long to be shown
                what, written_value, own = name, type(attribute)(**value).digest, attribute.digest
            if request.checkpoint is not None and name in getattr(data, "from_checkpoint", ()):
                raise UsageError(
                    f"{request.checkpoint} is of {what} {written_value}, and the data's are {own}: "
                    f"leave data.{name} out"
                )
            raise UsageError(f"{where}={written_value} does not fit the data, whose {what} is {own}: leave it out")
