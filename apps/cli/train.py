"""``moesaic fit|validate|test|predict``: runs the command on what ``setup`` makes: model, data and trainer."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import core
from apps.base.files import replacing
from apps.base.machine import machine_facts, moment
from apps.base.messages import counted
from apps.base.quiet import quiet
from apps.cli.errors import UsageError
from apps.cli.flags import wants_text
from apps.cli.options import Test, check_ending, check_new
from apps.cli.request import Request
from apps.cli.sections import Sections
from apps.cli.setup import RunSetup, shown
from apps.cli.sweep import Sweep
from apps.cli.write.page import test_page
from apps.cli.write.predictions import PredictionFile, print_stream, shortened, write_stream
from apps.registry import name_of
from apps.report.base import FOLDER
from apps.report.page import FILE, SECTIONS, Section, load_sections, open_page, show_page, write_page
from apps.report.page.writing import write_index
from apps.report.tables import print_in_parts, write_csv
from apps.train.checkpoint.checkpoints import BestAndLast
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.run_folder import RunFolder, check_own, marked_if_new
from apps.train.checkpoint.stopping import StopsSoon
from apps.train.device import device_line
from apps.train.lightning_internals import set_initial_hparams
from apps.train.publish.predicting import PredictionStream
from apps.train.threads import Threads
from apps.train.watch.logs import split_routing
from core.kernels import cpu


def run(request: Request) -> int:
    """Run the request and print its results."""
    with quiet():
        if wants_text(request.flags):
            with request.naming_origins():
                print(_yaml(shown(Sections(request.config).plain())), end="")
        else:
            SparseCLI(request).execute()
    return 0


def build(command: str, argv: list[str]) -> SparseCLI:
    """Return ``model``, ``datamodule``, ``trainer``, ``run_dir`` and ``ckpt_path`` of ``moesaic COMMAND ARGV`` as
    attributes of an object, and run nothing.

    Raises:
        UsageError: an option or a configuration is wrong.
        ValueError: the model or the data rejects a value.
        FileNotFoundError: the checkpoint or a configuration does not exist.
    """
    return SparseCLI(Request.read(command, argv))


class SparseCLI(RunSetup):
    """A command of ``moesaic``, which is run by ``execute`` and not by the constructor."""

    metrics: Mapping[str, float] = {}
    """Metrics of a test."""

    written: PredictionFile | None = None
    """The file that a prediction has written."""

    def execute(self) -> None:
        """Run the command and print its results."""
        command = self.request.command
        path = None if self.ckpt_path is None else str(self.ckpt_path)
        arguments = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": path, "weights_only": True}
        measures = command == "fit" and self.compiled is None  # compiled code is made for a number of threads
        threads = Threads(self.trainer, self.made["threads"], self.request.loaded, measures)
        if self.trainer.is_global_zero:  # the stdout of predict is for its predictions
            for line in filter(None, (device_line(self.trainer, self.model, threads), self.compiled)):
                print(line, file=sys.stderr if command == "predict" else None, flush=True)
        if command == "predict" and self.trainer.world_size > 1:
            raise UsageError(
                f"predict runs in one process, not in {self.trainer.world_size}, each of which would write its own "
                "part: give --trainer.devices 1 --trainer.num_nodes 1"
            )
        with threads.held():
            if command == "fit":
                self._fit(arguments)
            elif command == "predict":
                self._predict({**arguments, "return_predictions": False})
            else:
                self._evaluate(command, {**arguments, "verbose": False})

    def _fit(self, arguments: dict[str, Any]) -> None:
        options: Any = self.request.options
        start = time.monotonic()
        if self.request.sparsifies and self.trainer.is_global_zero:
            print(core.summary(self.model))
        with contextlib.ExitStack() as stack:
            stops = StopsSoon()
            self.trainer.callbacks.insert(0, stops)
            stack.enter_context(stops.handling())
            if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
                descriptions = self._descriptions()
                self._give_to_loggers(self.plain_config())
                folder = RunFolder(self.run_dir, descriptions, options.overwrite)
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
        """Return the files that describe a training next to its log, by name: its configuration and its signatures."""
        signatures = self._signatures()
        signed = {"signatures.json": json.dumps(signatures, indent=2) + "\n"} if signatures else {}
        return {"config.yaml": _yaml(self.plain_config()), **signed}

    def _evaluate(self, command: str, arguments: dict[str, Any]) -> None:
        check_own(self.run_dir / f"{command}.json")
        check_own(self.run_dir / FILE)
        kept = self.run_dir / FOLDER / SECTIONS
        earlier = kept.stat().st_mtime_ns if kept.exists() else None
        options = self.request.options
        sweep = None
        if isinstance(options, Test) and options.sweep:
            sweep = Sweep(self, options.rounds or 11, options.batches or 8)
        # A test writes its report before it ends, and may be killed in between.
        with self._marked_if_new():
            results = getattr(self.trainer, command)(**arguments)
        self.metrics = metrics = {k: float(v) for result in results for k, v in result.items()}
        if not self.trainer.is_global_zero:
            return
        path = self.run_dir / f"{command}.json"
        signatures = self._signatures()
        done = {**({"signatures": signatures} if signatures else {}), **self.experts.records()}
        with replacing(path) as file:
            about = {"command": self.request.command_line, "date": moment(), **machine_facts()}
            values = {"checkpoint": str(self.ckpt_path), **metrics, **done, "measured": about}
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

    def _marked_if_new(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that marks the folder of the run, unless the user names another place for its files."""
        is_elsewhere = getattr(self.request.options, "output", None) is not None
        if is_elsewhere or not self.trainer.is_global_zero:
            return contextlib.nullcontext()
        return marked_if_new(self.run_dir)

    def _report(self, metrics: Mapping[str, float], sections: Sequence[Section]) -> None:
        """Show the verdict and the figures of a test, and write its report and, next to it, the index of the runs."""
        config = _yaml(self.plain_config())
        monitored = getattr(self.model, "test_monitor", None)
        shown_metrics = getattr(self.model, "shown_metrics", ())
        command = self.request.command_line
        notes = [*self.experts.notes().values()]
        page = test_page(
            metrics, monitored, shown_metrics, self.run_dir, self.ckpt_path, command, config, sections, notes
        )
        show_page(page)
        write_page(page, self.run_dir / FILE)
        write_index(self.run_dir.parent)
        if isinstance(self.request.options, Test) and self.request.options.open:
            open_page(self.run_dir / FILE)

    def _signatures(self) -> dict[str, str]:
        """Return how the model's metrics are made; see ``SparseModule.metric_signatures``."""
        return dict(getattr(self.model, "metric_signatures", {}))

    def _print_signatures(self) -> None:
        for name, signature in self._signatures().items():
            print(f"{name}: {signature}")

    def _predict(self, arguments: dict[str, Any]) -> None:
        """Write the model's predictions, from its ``predict_stream`` if it has one, else from the trainer's loop."""
        options: Any = self.request.options
        if options.explain:
            self._check_explained()
        if self.trainer.strategy.root_device.type == "cpu":
            cpu.keep_freed()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            stream = self._stream()
            if options.open and (stream is None or stream.page is None):
                raise UsageError("open shows the page of a search, and this prediction has none: leave it out")
            if stream is not None:
                self._predict_stream(stream)
                self._print_offloaded()
                return
        if hasattr(self.model, "folder_writer"):
            self._predict_folder(arguments)
            return
        path = options.output or self.run_dir / "predictions.jsonl"
        check_ending(path)
        if path.suffix == ".txt":
            raise UsageError(
                f"output={path} is for lines of text, and this model predicts rows: give .jsonl, .csv or .parquet"
            )
        check_new(path, options.overwrite)
        table = path.with_suffix(".importance.csv")
        if options.explain:
            check_new(table, options.overwrite)
        with self._marked_if_new(), PredictionFile(path, raw_csv=options.raw_csv).open() as file:
            self.trainer.callbacks.append(file)
            self.trainer.predict(**arguments)
        self._print_written(file)
        if options.explain:
            write_csv(table, self.model.importances(self.datamodule))
            print(f"importance of the columns in {table}", file=sys.stderr)
        self._print_offloaded()

    def _predict_folder(self, arguments: dict[str, Any]) -> None:
        """Write predictions that are files themselves, by the model's own writer."""
        options: Any = self.request.options
        if options.output is not None and options.output.suffix:
            raise UsageError(f"output={options.output} is a file, and this model draws images: give a folder")
        folder = options.output or self.run_dir / "images"
        writer = self.model.folder_writer(folder, options.overwrite)
        start = time.monotonic()
        with self._marked_if_new(), writer.open():
            self.trainer.callbacks.append(writer)
            self.trainer.predict(**arguments)
        print(f"{writer}, in {time.monotonic() - start:.1f} s")
        self._print_offloaded()

    def _check_explained(self) -> None:
        """Raise a ``UsageError`` for a model without columns, or rows without labels."""
        if not (hasattr(self.model, "importances") and hasattr(self.datamodule, "examples")):
            raise UsageError(f"explain is for a model of columns, and {name_of(type(self.model))} is none")
        if (file := getattr(self.datamodule, "predict_file", None)) is not None:
            raise UsageError(f"explain shuffles columns of labeled test rows: leave out data.predict_file={file}")

    def _predict_stream(self, stream: PredictionStream) -> None:
        """Print the predictions of a stream, or write them to the file that the user names; then write their page."""
        options: Any = self.request.options
        path = options.output
        if path is not None:
            check_ending(path)
            check_new(path, options.overwrite)
            how = {"overwrite": options.overwrite, "raw_csv": options.raw_csv}
            self._print_written(write_stream(self.model, stream, path, **how))
        else:
            path = self.run_dir / stream.file if stream.file else None
            if path is not None:
                check_own(path)
            start = time.monotonic()
            with contextlib.nullcontext() if path is None else self._marked_if_new():
                count = print_stream(stream, path)
            also = "" if path is None else f", also in {path}"
            took = f"in {time.monotonic() - start:.1f} s"
            print(f"{counted(count, 'prediction')} {took}{also}", file=sys.stderr)
        if stream.page is not None and path is not None:
            page = path.with_suffix(".html")
            stream.page(page)
            print(f"page: {page}", file=sys.stderr)
            if options.open:
                open_page(page)

    def _print_offloaded(self) -> None:
        if "offload" in (notes := self.experts.notes()):
            print(notes["offload"], file=sys.stderr)

    def _stream(self) -> PredictionStream | None:
        """Return the predictions of a model that predicts by itself, with weights loaded; None for other models."""
        predict_stream = getattr(self.model, "predict_stream", None)
        stream = None if predict_stream is None else predict_stream(self.datamodule)
        if stream is not None:
            if self.ckpt_path is not None:
                self.model.load_state_dict(read_checkpoint(self.ckpt_path)["state_dict"])
            self.experts.apply(self.model, self.trainer.strategy.root_device)
            self.model.to(self.trainer.strategy.root_device).eval()
        return stream

    def _print_written(self, file: PredictionFile) -> None:
        self.written = file
        for line in file.first:
            print(shortened(line))
        earlier = f", {file.start:,} of them by an earlier run" if file.start else ""
        print(f"{counted(file.num_rows, 'prediction')} in {file.path}{earlier}")


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False)


def print_metrics(metrics: Mapping[str, float], stage: str, title: str) -> None:
    """Print the metrics of ``stage`` as a table, and each layer's routing metrics as another."""
    from rich.console import Console
    from rich.table import Table

    own, layers = split_routing(metrics, stage)
    table = Table("metric", "value")
    for key, value in own.items():
        table.add_row(key, f"{value:.4f}")
    console = Console()
    console.print(title)
    console.print(table)
    if layers:
        figures = list(dict.fromkeys(f for values in layers.values() for f in values))
        if len(layers) == 2:  # one layer is its own mean
            layers.pop("", None)
        headings = ["layer", *(figure.replace("_", " ") for figure in figures)]
        rows = [[f"{own[f]:.3f}" if f in own else "" for f in figures] for own in layers.values()]
        print_in_parts(headings, [[layer or "mean", *row] for layer, row in zip(layers, rows, strict=True)])
