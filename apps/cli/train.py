"""``moesaic fit|validate|test|predict``: LightningCLI, where model and data are classes that the configuration names.

The user's words win, flags over files and later files over earlier ones; other options come from the checkpoint, then
from the constructors. A checkpoint whose tensors do not fit is refused with the options that differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.plugins.io import CheckpointIO

import core
from apps.base.files import replacing
from apps.base.machine import machine_facts, moment
from apps.base.messages import counted
from apps.base.quiet import quiet
from apps.cli import UsageError
from apps.cli.checkpoint import check_fits
from apps.cli.classes import with_short_names
from apps.cli.configs import differences
from apps.cli.errors import reduce_message
from apps.cli.flags import asks, take
from apps.cli.jsonargparse_internals import options_of, read_whole_numbers_first
from apps.cli.offloaded import OffloadsExperts
from apps.cli.page import test_page
from apps.cli.predictions import PredictionFile, print_stream, shortened, write_stream
from apps.cli.quantised import QuantisesExperts
from apps.cli.request import Request
from apps.cli.sweep import Sweep
from apps.cli.usage import check_new
from apps.registry import name_of
from apps.report.base import FOLDER
from apps.report.page import FILE, SECTIONS, Section, load_sections, open_page, show_page, write_index, write_page
from apps.report.tables import print_in_parts
from apps.train.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.chosen import SECTIONS as SECTIONS_OF_OPTIMIZER
from apps.train.chosen import Chosen
from apps.train.compiling import CompileConfig, compile_networks
from apps.train.contents import read_checkpoint
from apps.train.device import device_line, device_options, set_matmul_precision
from apps.train.lightning_internals import WaitingCLI, set_initial_hparams
from apps.train.linked import LinkedModule
from apps.train.logs import EventLog, MetricsCSV, profiler
from apps.train.measures import TrainingMeasures
from apps.train.module import SparseModule
from apps.train.offloading import described, record, room_for_experts
from apps.train.predicting import PredictionStream
from apps.train.progress import progress
from apps.train.quantising import Quantised, form_of
from apps.train.resume import GeneratorState
from apps.train.run_folder import OF_USERS, RunFolder, check_free, check_own, check_unlinked, is_unused, mark
from apps.train.sparsified import SparsifyConfig, sparsified
from apps.train.stopping import StopsSoon
from core.config.plain import from_plain, to_plain
from core.kernels import cpu
from core.registry import OpenConfig

TRAINER_DEFAULTS = {
    "devices": 1,  # what divides a training, as configs/parallel does, names more
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,  # SparseModule logs the size, with the active parameters
}
"""Defaults that differ from those of Lightning's Trainer."""


def run(request: Request) -> int:
    """Run the request and print its results."""
    with quiet():
        SparseCLI(request).execute()
    return 0


def build(command: str, argv: list[str]) -> SparseCLI:
    """Return ``model``, ``datamodule``, ``trainer``, ``run_dir`` and ``ckpt_path`` of ``moesaic COMMAND ARGV`` as
    attributes of an object, and run nothing.

    Raises:
        UsageError: an option or a configuration is wrong.
        ValueError: the model or the data refuses a value.
        FileNotFoundError: the checkpoint or a configuration does not exist.
    """
    return SparseCLI(Request.read(command, argv))


class SparseCLI(WaitingCLI, LightningCLI):
    """LightningCLI for one command, which is run by ``execute`` and not by the constructor."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run_dir = request.run_dir
        self.ckpt_path = request.checkpoint
        self.metrics: dict[str, float] = {}  # of a test
        self.written: PredictionFile | None = None
        self.quantises = None if request.quantize is None else QuantisesExperts(request.quantize)
        self.offloads = None if request.offload is None else OffloadsExperts(request.offload)
        if request.command == "fit":  # before anything slow
            check_free(self.run_dir)
        check_unlinked(p for p in self.run_dir.glob("*") if request.command == "fit" or p.name in (FOLDER, "profile"))
        self.subcommands = lambda: {request.command: LightningCLI.subcommands()[request.command]}  # type: ignore[method-assign]
        read_whole_numbers_first()
        # A dataclass field is a fixed group to jsonargparse unless its class is listed here.
        set_parsing_settings(subclasses_enabled=[OpenConfig])
        # An abbreviation would be taken silently: --trainer.max_epoch for max_epochs.
        parser = {"exit_on_error": False, "allow_abbrev": False}
        with request.config_file() as config:
            try:
                super().__init__(
                    LightningModule,
                    LightningDataModule,
                    save_config_callback=None,
                    trainer_defaults=dict(TRAINER_DEFAULTS),
                    seed_everything_default=0,
                    parser_kwargs={**parser, "prog": "moesaic", request.command: parser},
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    args=[request.command, *(["--config", config] if config else []), *request.flags],
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
            except ArgumentError as error:
                options = options_of(self.command_parser(request.command))
                raise UsageError(reduce_message(str(error), options)) from error

    # ---- what LightningCLI calls

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in getattr(self.request.model_class, "data_arguments", ()):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="high",
            help="products of float32 numbers on a CUDA GPU; high and medium round their inputs (TF32, bfloat16)",
        )
        if self.request.sparsifies:
            parser.add_argument("--sparsify", type=SparsifyConfig | None, default=None)
        parser.add_optimizer_args((torch.optim.Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        parser.add_argument("--lr_scheduler_interval", type=Literal["epoch", "step"] | None, default=None)
        parser.add_argument("--compile", type=bool | CompileConfig | None, default=None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if asks(self.request.flags):  # the parser above the commands prints what is in force
            self.config = parser.parse_args(args)
            return
        # It would read all that the command's own parser has read once more, which is as long again.
        command, *rest = args
        config = self.command_parser(command).parse_args(rest)
        self.config = Namespace({"subcommand": command, command: config})

    def instantiate_classes(self) -> None:
        created = [(self._create_data, LightningDataModule, True), (self._create_model, LightningModule, True)]
        self.config_init = self.parser.instantiate(self.config, instantiators=created)
        values = self.config_init[self.request.command]
        self.datamodule, self.model = (values.get(part) for part in ("data", "model"))
        section = values.get("sparsify")
        if section is not None:
            self.model = sparsified(self.model, section)
            self.model.sparsify_arguments = yaml.safe_load(self.plain_config())["model"].get("init_args") or {}
        self.compiled = train_as_given(self.model, values)
        self.trainer = self.instantiate_trainer()
        self._check_links()
        if self.request.exported is not None:
            self.request.exported.attach(self.model)
        elif self.ckpt_path is not None and self.request.loaded is not None:
            self._check_fits(self.request.loaded, self.ckpt_path)
            self.model.starts_afresh = False  # Lightning loads the checkpoint only after the model's setup
        elif self.request.weights is not None:
            self._begin_with(self.request.weights)

    def _check_fits(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Give the model the parts that its checkpoint has, and refuse a checkpoint that does not fit it."""
        if hasattr(self.model, "take_form"):
            self.model.take_form(checkpoint)
        check_fits(checkpoint, self.model, path)

    def _begin_with(self, path: Path) -> None:
        """Load the weights of a checkpoint, with which a training begins anew."""
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

    def _create_data(self, kind: type[LightningDataModule], *args: Any, **kwargs: Any) -> LightningDataModule:
        """Make the data, with the checkpoint's encoding before the model takes its arguments from them."""
        data = kind(*args, **kwargs)
        adopt, checkpoint = getattr(data, "adopt", None), self.request.loaded or self.request.begun_with or {}
        model = self.request.model_class
        own = None if model is None else name_of(model)
        if self.request.weights is not None:
            adopt = getattr(data, "extend", adopt)
        if adopt is not None and "encoding" in checkpoint and checkpoint.get("module_class") == own:
            adopt(checkpoint["encoding"])
        return data

    def _create_model(self, kind: type[LightningModule], *args: Any, **kwargs: Any) -> LightningModule:
        """Make the model, without weights where a graph runs in their place, or a checkpoint's go to a file."""
        if self.request.exported is not None:
            with torch.device("meta"):
                return kind(*args, **kwargs)
        # Other strategies move or divide a model before its checkpoint is read.
        loads_first = self.config[self.request.command].trainer.get("strategy") in ("auto", "ddp")
        is_filled = self.ckpt_path is not None and issubclass(kind, LinkedModule) and loads_first
        with room_for_experts(self.request.offload if is_filled else None):
            return kind(*args, **kwargs)

    def _check_links(self) -> None:
        """Raise a ``UsageError`` where the configuration has another value for an argument that the data decides."""
        written = self.request.config.get("model")
        given = dict(written.get("init_args", {})) if isinstance(written, Mapping) else {}
        for name in getattr(self.request.model_class, "data_arguments", ()):
            option = f"model.{name}"
            flags = take(list(self.request.flags), (option, f"model.init_args.{name}"))[1]
            value = yaml.safe_load((flags[option] + flags[f"model.init_args.{name}"] or ["null"])[-1])
            value = given.get(name) if value is None else value
            attribute: Any = getattr(self.datamodule, name, None)
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
                if self.ckpt_path is not None and name in getattr(self.datamodule, "from_checkpoint", ()):
                    raise UsageError(
                        f"{self.ckpt_path} is of {what} {written_value}, and the data's are {own}: "
                        f"leave data.{name} out"
                    )
                raise UsageError(f"{where}={written_value} does not fit the data, whose {what} is {own}: leave it out")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init[self.request.command]["trainer"]
        if given.get("default_root_dir") is not None:
            raise UsageError(
                f"trainer.default_root_dir={given['default_root_dir']} would split the run: give --run_dir, which is "
                "the one folder of its files"
            )
        kwargs |= {"default_root_dir": str(self.run_dir), **device_options(given)}
        set_matmul_precision(kwargs, self.config_init[self.request.command]["float32_matmul_precision"])
        callbacks = kwargs["callbacks"] = self._callbacks(given.get("callbacks") or [])
        defaults: list[Callback] = [GeneratorState()]
        if self.quantises is not None:
            defaults.append(self.quantises)
        if self.offloads is not None:  # after the quantisation
            defaults.append(self.offloads)
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
        self.trainer_defaults["callbacks"] = defaults
        kwargs["logger"] = self._loggers(given.get("logger"))
        if isinstance(given.get("profiler"), str):
            kwargs["profiler"] = profiler(given["profiler"], self.run_dir / "profile")
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO(mapped=self.request.command != "fit")]
        return super().instantiate_trainer(**kwargs)

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
        """Return the trainer's loggers: ``metrics.csv``, which reports read, and TensorBoard's or those of the user."""
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

    # ---- the commands

    def execute(self) -> None:
        """Run the command and print its results."""
        command = self.request.command
        path = None if self.ckpt_path is None else str(self.ckpt_path)
        arguments = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": path, "weights_only": True}
        if self.trainer.is_global_zero:  # the stdout of predict is for what it predicts
            for line in filter(None, (device_line(self.trainer, self.model), self.compiled)):
                print(line, file=sys.stderr if command == "predict" else None, flush=True)
        if command == "fit":
            self._fit(arguments)
        elif command == "predict":
            if self.trainer.world_size > 1:
                raise UsageError(
                    f"predict runs in one process, not in {self.trainer.world_size}, each of which would write its own "
                    "part: give --trainer.devices 1 --trainer.num_nodes 1"
                )
            self._predict({**arguments, "return_predictions": False})
        else:
            self._evaluate(command, {**arguments, "verbose": False})

    def _fit(self, arguments: dict[str, Any]) -> None:
        start = time.monotonic()
        if self.request.sparsifies and self.trainer.is_global_zero:
            print(core.summary(self.model))
        with contextlib.ExitStack() as stack:
            stops = StopsSoon()
            self.trainer.callbacks.insert(0, stops)
            stack.enter_context(stops.handling())
            if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
                descriptions = self._descriptions()
                self._give_to_loggers(yaml.safe_load(descriptions["config.yaml"]))
                folder = RunFolder(self.run_dir, descriptions, self.request.overwrite)
                self.trainer.callbacks.insert(0, folder)
                stack.enter_context(folder.held())
            self.trainer.fit(**arguments)
        if not self.trainer.is_global_zero:
            return
        step, seconds = self.trainer.global_step, time.monotonic() - start
        own = f" ({step - stops.first_step} of them now)" if stops.first_step else ""
        print(f"trained {self.trainer.current_epoch} epochs, {step} steps{own}, in {seconds:.1f} s")
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, BestAndLast):
                best = "" if callback.best_score is None else f"; best {callback.monitor} {callback.best_score:.4g}"
                print(f"checkpoints: {self.run_dir / 'checkpoints'}{best}")
            elif isinstance(callback, ModelCheckpoint):
                print(f"{type(callback).__name__}: {callback.dirpath}")
        if self.trainer.profiler.dirpath is not None:
            print(f"profile: {self.trainer.profiler.dirpath}")
        self._print_signatures()

    def _give_to_loggers(self, config: Mapping[str, Any]) -> None:
        """Have Lightning log the whole configuration as the hyper-parameters of the training."""
        own = {} if isinstance(self.model, LinkedModule) else self.model.hparams_initial
        set_initial_hparams(self.model, {**own, **config}, logs=True)

    def _descriptions(self) -> dict[str, str]:
        """Return the files that describe a training beside its log, by name: its configuration and its signatures."""
        signatures = self._signatures()
        signed = {"signatures.json": json.dumps(signatures, indent=2) + "\n"} if signatures else {}
        return {"config.yaml": self.plain_config(), **signed}

    def plain_config(self) -> str:
        """Return the configuration in force as YAML."""
        command = self.request.command
        config = yaml.safe_load(self.command_parser(command).dump(self.config[command], skip_unset=False))
        no_part = {"config", "ckpt_path", "weights_only", "verbose"}
        no_part |= {name for name in (*SECTIONS_OF_OPTIMIZER, "compile") if config.get(name) is None}
        config = {"run_dir": str(self.run_dir), **{k: v for k, v in config.items() if k not in no_part}}
        return yaml.safe_dump(with_short_names(config), sort_keys=False)

    def _evaluate(self, command: str, arguments: dict[str, Any]) -> None:
        check_own(self.run_dir / f"{command}.json")
        check_own(self.run_dir / FILE)
        is_new = is_unused(self.run_dir)  # before a test's report is in it
        kept = self.run_dir / FOLDER / SECTIONS
        earlier = kept.stat().st_mtime_ns if kept.exists() else None
        sweep = None if self.request.sweep is None else Sweep(self, self.request.sweep)
        results = getattr(self.trainer, command)(**arguments)
        self.metrics = metrics = {k: float(v) for result in results for k, v in result.items()}
        if not self.trainer.is_global_zero:
            return
        path = self.run_dir / f"{command}.json"
        if is_new:
            mark(self.run_dir)
        signatures = self._signatures()
        signed: dict[str, Any] = {"signatures": signatures} if signatures else {}
        quantised = self._quantised()
        if quantised is not None:
            signed["quantized"] = quantised.record()
        if self.offloads is not None and self.offloads.done is not None:
            signed["offloaded"] = record(self.offloads.how, self.offloads.done)
        with replacing(path) as file:
            about = {"command": self.request.command_line, "date": moment(), **machine_facts()}
            values = {"checkpoint": str(self.ckpt_path), **metrics, **signed, "measured": about}
            file.write(json.dumps(values, indent=2) + "\n")
        if command == "test":
            # An earlier test's report may be there, of another model.
            is_own = kept.exists() and kept.stat().st_mtime_ns != earlier
            sections = load_sections(kept.parent) if is_own else ()
            self._report(metrics, sections if sweep is None else (*sections, sweep.run(metrics)))
        else:
            print_metrics(metrics, "val", f"{command} of {self.ckpt_path or 'an untrained model'}")
        self._print_signatures()
        print(f"also in {path}")

    def _report(self, metrics: Mapping[str, float], sections: Sequence[Section]) -> None:
        """Show the verdict and the figures of a test, and write its report and the index of the runs beside it."""
        config = self.plain_config()
        monitored = getattr(self.model, "test_monitor", None)
        shown_metrics = getattr(self.model, "shown_metrics", ())
        command = self.request.command_line
        quantised = self._quantised()
        notes = [] if quantised is None else [str(quantised)]
        if self.offloads is not None and self.offloads.done is not None:
            notes.append(described(self.offloads.done))
        page = test_page(
            metrics, monitored, shown_metrics, self.run_dir, self.ckpt_path, command, config, sections, notes
        )
        show_page(page)
        write_page(page, self.run_dir / FILE)
        write_index(self.run_dir.parent)
        if self.request.opens:
            open_page(self.run_dir / FILE)

    def _quantised(self) -> Quantised | None:
        """Return what ``--quantize`` has quantised; None without it."""
        return None if self.quantises is None else self.quantises.done

    def _signatures(self) -> dict[str, str]:
        """Return how the model's metrics are made; see ``SparseModule.metric_signatures``."""
        return dict(getattr(self.model, "metric_signatures", {}))

    def _print_signatures(self) -> None:
        for name, signature in self._signatures().items():
            print(f"{name}: {signature}")

    def _predict(self, arguments: dict[str, Any]) -> None:
        """Write the model's predictions, from its ``predict_stream`` where it has one, else from the trainer's loop."""
        path, overwrite = self.request.output, self.request.overwrite
        if self.trainer.strategy.root_device.type == "cpu":
            cpu.keep_freed()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            stream = self._stream()
            if self.request.opens and (stream is None or stream.page is None):
                raise UsageError("open shows the page of a search, and this prediction has none: leave it out")
            if stream is not None:
                self._predict_stream(stream)
                self._print_offloaded()
                return
        path = path or self.run_dir / "predictions.jsonl"
        if path.suffix == ".txt":
            raise UsageError(
                f"output={path} is for lines of text, and this model predicts rows: give .jsonl, .csv or .parquet"
            )
        check_new(path, overwrite)
        if self.request.output is None and is_unused(self.run_dir):
            mark(self.run_dir)
        with PredictionFile(path, raw_csv=self.request.raw_csv).open() as file:
            self.trainer.callbacks.append(file)
            self.trainer.predict(**arguments)
        self._print_written(file)
        self._print_offloaded()

    def _predict_stream(self, stream: PredictionStream) -> None:
        """Print the predictions of a stream, or write them to the file that the user names; then write their page."""
        path, overwrite, raw_csv = self.request.output, self.request.overwrite, self.request.raw_csv
        if path is not None:
            check_new(path, overwrite)
            self._print_written(write_stream(self.model, stream, path, overwrite=overwrite, raw_csv=raw_csv))
        else:
            path = self.run_dir / stream.file if stream.file else None
            if path is not None:
                check_own(path)
                if is_unused(self.run_dir):
                    mark(self.run_dir)
            start, count = time.monotonic(), print_stream(stream, path)
            also = "" if path is None else f", also in {path}"
            took = f"in {time.monotonic() - start:.1f} s"
            print(f"{counted(count, 'prediction')} {took}{also}", file=sys.stderr)
        if stream.page is not None and path is not None:
            page = path.with_suffix(".html")
            stream.page(page)
            print(f"page: {page}", file=sys.stderr)
            if self.request.opens:
                open_page(page)

    def _print_offloaded(self) -> None:
        if self.offloads is not None and self.offloads.done is not None:
            print(described(self.offloads.done), file=sys.stderr)

    def _stream(self) -> PredictionStream | None:
        """Return the predictions of a model that predicts by itself, with weights loaded; None for other models."""
        predict_stream = getattr(self.model, "predict_stream", None)
        stream = None if predict_stream is None else predict_stream(self.datamodule)
        if stream is not None:
            if self.ckpt_path is not None:
                self.model.load_state_dict(read_checkpoint(self.ckpt_path)["state_dict"])
            if self.quantises is not None:
                self.quantises.apply(self.model)
            if self.offloads is not None:
                self.offloads.apply(self.model, self.trainer.strategy.root_device)
            self.model.to(self.trainer.strategy.root_device).eval()
        return stream

    def _print_written(self, file: PredictionFile) -> None:
        self.written = file
        for line in file.first:
            print(shortened(line))
        earlier = f", {file.start:,} of them by an earlier run" if file.start else ""
        print(f"{counted(file.num_rows, 'prediction')} in {file.path}{earlier}")


def train_as_given(module: LightningModule, sections: Mapping[str, Any]) -> str | None:
    """Give a module the optimizer that parsed sections name, compile its networks, and return the line of the latter.

    Raises:
        ValueError: as ``Chosen.take_place_in``, or the interval of no scheduler.
    """
    chosen = Chosen.of(sections)
    if chosen is not None:
        chosen.take_place_in(module)
    return compile_networks(module, sections.get("compile"))


def print_metrics(metrics: Mapping[str, float], stage: str, title: str) -> None:
    """Print the metrics of ``stage`` as a table, and those of each layer's routing as another."""
    from rich.console import Console
    from rich.table import Table

    prefix = f"{stage}/"
    own = {k.removeprefix(prefix): v for k, v in metrics.items()}
    layers: dict[str, dict[str, float]] = {}
    table = Table("metric", "value")
    for key, value in own.items():
        if key.startswith("routing/"):
            layer, _, figure = key.removeprefix("routing/").rpartition("/")
            layers.setdefault(layer or "mean", {})[figure] = value
        else:
            table.add_row(key, f"{value:.4f}")
    console = Console()
    console.print(title)
    console.print(table)
    if layers:
        figures = list(dict.fromkeys(f for values in layers.values() for f in values))
        if len(layers) == 2:  # one layer is its own mean
            layers.pop("mean", None)
        cells = {
            layer: [f"{values[f]:.3f}" if f in values else "" for f in figures] for layer, values in layers.items()
        }
        headings = ["layer", *(figure.replace("_", " ") for figure in figures)]
        print_in_parts(headings, [[layer, *values] for layer, values in cells.items()])
