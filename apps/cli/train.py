"""``moesaic fit|validate|test|predict``: LightningCLI, where model and data are classes that the configuration names.

What the user writes wins, flags over files and later files over earlier ones; what is written nowhere comes from the
checkpoint, then from the constructors. A checkpoint whose tensors do not fit is refused with the options that differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import json
import logging
import os
import pkgutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

import apps
import core
from apps.callbacks import AtomicCheckpointIO, BestAndLast, GeneratorState, MetricsCSV, progress
from apps.cli import UsageError
from apps.cli.errors import reduce_message
from apps.training import to_plain

COMMANDS = ("fit", "validate", "test", "predict")

_TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,  # SparseModule logs the size, with the active parameters
}
# Advice that does not apply here: data in memory needs no workers, short epochs are logged by step, promotions.
_UNHELPFUL_WARNINGS = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*treespec, LeafSpec.*",
    ".*LeafSpec.*is deprecated.*",
    ".*litlogger.*",
    ".*litmodels.*",
    ".*GPU available but not used.*",
    ".*`isinstance\\(treespec.*",
    ".*no logger configured.*",
    ".*Trying to infer the `batch_size`.*",
)


def run(command: str, argv: list[str]) -> int:
    """Parse ``argv``, run ``command``, print what it found."""
    with quiet():
        cli = build(command, argv)
        cli.execute()
    return 0


def build(command: str, argv: list[str]) -> SparseCLI:
    """Model, data and trainer as ``moesaic COMMAND ARGV`` has them, without running anything.

    The attributes ``model``, ``datamodule``, ``trainer``, ``run_dir`` and ``ckpt_path`` are what a caller needs.

    Raises:
        UsageError: a wrong option or configuration.
        ValueError: a value that the model or the data refuses.
        FileNotFoundError: no such checkpoint or configuration.
    """
    # A dataclass field is a fixed group to jsonargparse unless its class is listed here.
    set_parsing_settings(subclasses_enabled=[core.RouterConfig, core.ExpertConfig])
    return SparseCLI(Request.read(command, argv))


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line, read as far as the parser needs to know beforehand.

    Attributes:
        command: fit, validate, test or predict.
        flags: the arguments but for the configurations, --run_dir and --ckpt_path.
        config: the configurations merged, later ones over earlier ones, with what the checkpoint remembers beneath.
        run_dir: where the run's files are.
        checkpoint: the file to load, or None.
        model_class: the model's class, where it is named.
    """

    command: str
    flags: tuple[str, ...]
    config: Mapping[str, Any]
    run_dir: Path
    checkpoint: Path | None
    model_class: type | None

    @classmethod
    def read(cls, command: str, argv: list[str]) -> Request:
        flags, options = _take(argv, ("config", "c", "run_dir", "ckpt_path"))
        paths = [Path(p) for p in options["config"] + options["c"]]
        which = options["ckpt_path"][-1] if options["ckpt_path"] else None
        if not paths and which not in (None, "last", "best", "null", "none"):
            # A checkpoint lies in its run's folder, beside the configuration of the run.
            beside = Path(which).parent.parent / "config.yaml"
            paths = [beside] if beside.is_file() else []
        config: dict[str, Any] = {}
        for path in paths:
            config = merge(config, _read_yaml(path))
        run_dir = options["run_dir"][-1] if options["run_dir"] else config.pop("run_dir", None)
        config.pop("run_dir", None)
        if which is None:
            which = config.pop("ckpt_path", None)
        config.pop("ckpt_path", None)
        run_dir = Path(run_dir) if run_dir else Path("runs") / ("-".join(p.stem for p in paths) or "unnamed")
        checkpoint = _find_checkpoint(command, which, run_dir)
        if checkpoint is not None:
            config = merge(_remembered(load_checkpoint(checkpoint), config), config)
        return cls(command, tuple(flags), config, run_dir, checkpoint, _model_class(flags, config))

    @contextlib.contextmanager
    def config_file(self) -> Iterator[str | None]:
        """The merged configuration as a file, while the parser reads it."""
        if not self.config:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
            yield str(path)


class SparseCLI(LightningCLI):
    """LightningCLI for one command, which is run by ``execute`` and not by the constructor."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run_dir = request.run_dir
        self.ckpt_path = request.checkpoint
        self.subcommands = lambda: {request.command: LightningCLI.subcommands()[request.command]}  # type: ignore[method-assign]
        # An abbreviation would be taken silently: --trainer.max_epoch for max_epochs.
        parser = {"exit_on_error": False, "allow_abbrev": False}
        with request.config_file() as config:
            try:
                super().__init__(
                    LightningModule,
                    LightningDataModule,
                    save_config_callback=None,
                    trainer_defaults=dict(_TRAINER_DEFAULTS),
                    seed_everything_default=0,
                    parser_kwargs={**parser, "prog": "moesaic", request.command: parser},
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    args=[request.command, *(["--config", config] if config else []), *request.flags],
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
            except ArgumentError as error:
                raise UsageError(reduce_message(str(error), self.options())) from error

    def options(self) -> list[str]:
        """The dotted options of the command."""
        return [a.dest for a in self._subcommand_parsers[self.request.command]._actions]

    # ---- what LightningCLI calls

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in getattr(self.request.model_class, "data_arguments", ()):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint win over the command line: ``Request`` has merged the two."""

    def _run_subcommand(self, subcommand: str) -> None:
        """``execute`` runs it."""

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self._check_links()
        if self.ckpt_path is not None:
            check_fits(load_checkpoint(self.ckpt_path), self.model, self.ckpt_path)

    def _check_links(self) -> None:
        """A value that the data decides, written in the configuration as well, must be the same."""
        written = self.request.config.get("model")
        given = dict(written.get("init_args", {})) if isinstance(written, Mapping) else {}
        for name in getattr(self.request.model_class, "data_arguments", ()):
            option = f"model.{name}"
            flags = _take(list(self.request.flags), (option, f"model.init_args.{name}"))[1]
            value = yaml.safe_load((flags[option] + flags[f"model.init_args.{name}"] or ["null"])[-1])
            value = given.get(name) if value is None else value
            found = getattr(self.datamodule, name, None)
            if value is not None and value != found:
                raise UsageError(f"{option}={value} does not fit the data, whose {name} is {found}: leave it out")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if given.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.run_dir)
        callbacks = given.get("callbacks") or []
        defaults: list[Callback] = [GeneratorState()]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            defaults.append(progress())
            kwargs["enable_progress_bar"] = isinstance(defaults[-1], ProgressBar)
        if given.get("enable_checkpointing") is not False and not given.get("fast_dev_run"):
            if not any(isinstance(c, Checkpoint) for c in callbacks):
                defaults.append(BestAndLast(str(self.run_dir / "checkpoints")))
        else:
            kwargs["enable_checkpointing"] = False
        self.trainer_defaults["callbacks"] = defaults
        if given.get("logger") in (None, True):
            kwargs["logger"] = self._loggers()
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> Any:
        if self.request.command != "fit":  # a test must not touch the log of the training
            return False
        return [
            MetricsCSV(str(self.run_dir)),
            TensorBoardLogger(str(self.run_dir), name="tensorboard", version="", default_hp_metric=False),
        ]

    # ---- the commands

    def execute(self) -> None:
        """Run the command and print what it found."""
        command = self.request.command
        arguments = self._prepare_subcommand_kwargs(command)
        arguments["ckpt_path"] = None if self.ckpt_path is None else str(self.ckpt_path)
        arguments["weights_only"] = True
        if command == "fit":
            self._fit(arguments)
        elif command == "predict":
            arguments["return_predictions"] = True
            self._predict(arguments)
        else:
            arguments["verbose"] = False
            self._evaluate(command, arguments)

    def _fit(self, arguments: dict[str, Any]) -> None:
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            if self.ckpt_path is None and (self.run_dir / "checkpoints").is_dir():
                print(f"{self.run_dir} holds an earlier run; this one replaces it (--ckpt_path last goes on from it)")
            self._save_config()
        start, first_step = time.monotonic(), self.trainer.global_step
        self.trainer.fit(**arguments)
        if not self.trainer.is_global_zero:
            return
        steps, seconds = self.trainer.global_step - first_step, time.monotonic() - start
        print(f"trained {self.trainer.current_epoch} epochs, {steps} steps, in {seconds:.1f} s")
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, BestAndLast):
                best = "" if callback.best_score is None else f"; best {callback.monitor} {callback.best_score:.4g}"
                print(f"checkpoints: {self.run_dir / 'checkpoints'}{best}")

    def _save_config(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        parser = self._parser("fit")
        config = yaml.safe_load(parser.dump(self.config["fit"], skip_none=False))
        config = {"run_dir": str(self.run_dir), **{k: v for k, v in config.items() if k not in ("config", "ckpt_path")}}
        path = self.run_dir / "config.yaml"
        temporary = path.with_suffix(".yaml.tmp")
        try:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _evaluate(self, command: str, arguments: dict[str, Any]) -> None:
        results = getattr(self.trainer, command)(**arguments)
        if not self.trainer.is_global_zero:
            return
        metrics = {k: float(v) for result in results for k, v in result.items()}
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / f"{command}.json"
        path.write_text(json.dumps({"checkpoint": str(self.ckpt_path), **metrics}, indent=2) + "\n")
        stage = "val" if command == "validate" else command
        print_metrics(metrics, stage, f"{command} of {self.ckpt_path or 'an untrained model'}")
        print(f"also in {path}")

    def _predict(self, arguments: dict[str, Any]) -> None:
        batches = self.trainer.predict(**arguments) or []
        if not self.trainer.is_global_zero:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "predictions.jsonl"
        count = 0
        with open(path, "w") as file:
            for batch in batches:
                for row in _rows(batch):
                    file.write(json.dumps(row) + "\n")
                    if count < 3:
                        print(json.dumps(row))
                    count += 1
        print(f"{count} predictions in {path}")


def print_metrics(metrics: Mapping[str, float], stage: str, title: str) -> None:
    """The metrics of ``stage`` as a table, and what they say of each layer's routing as another."""
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
        routing = Table("layer", *(f.replace("_", " ") for f in figures))
        for layer, values in layers.items():
            routing.add_row(layer, *(f"{values[f]:.3f}" if f in values else "" for f in figures))
        console.print(routing)


# ---- configurations


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, mapping by mapping. Where it names another class, the old one's arguments go.

    Example::

        merge({"router": {"class_path": "TokenChoice", "init_args": {"top_k": 1}}}, {"router": "ExpertChoice"})
        # {"router": {"class_path": "ExpertChoice"}}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and "class_path" in old and isinstance(value, str):
            value = {"class_path": value}
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            merged[key] = value
        elif "class_path" in old and "class_path" not in value and "init_args" not in value:
            merged[key] = {**old, "init_args": merge(old.get("init_args") or {}, value)}
        elif "class_path" in value and "init_args" in value and "class_path" not in old:
            merged[key] = {**value, "init_args": merge(old, value["init_args"])}
        elif _short(old.get("class_path")) != _short(value.get("class_path", old.get("class_path"))):
            merged[key] = dict(value)
        else:
            merged[key] = merge(old, value)
    return merged


def _short(class_path: str | None) -> str | None:
    return class_path and class_path.rpartition(".")[2]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder, not a configuration") from error
    except FileNotFoundError as error:
        raise UsageError(f"no configuration {path}{_nearest(path)}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a configuration: it holds a {type(config).__name__}, not keys with values")
    return config


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
    return f"; did you mean {path.parent / near[0]}.yaml?" if near else ""


def _take(argv: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """``argv`` without the options called ``names``, and their values."""
    rest: list[str] = []
    found: dict[str, list[str]] = {name: [] for name in names}
    items = iter(argv)
    for item in items:
        key, equals, value = item.partition("=")
        name = key.lstrip("-")
        if not (key.startswith("-") and name in names and (len(name) == 1) == (not key.startswith("--"))):
            rest.append(item)
            continue
        if not equals:
            value = next(items, "")
        if not value or (not equals and value.startswith("--")):
            raise UsageError(f"{key} needs a value")
        found[name].append(value)
    return rest, found


def _model_class(flags: list[str], config: Mapping[str, Any]) -> type | None:
    model = config.get("model")
    path = model if isinstance(model, str) else model.get("class_path") if isinstance(model, Mapping) else None
    _, given = _take(flags, ("model", "model.class_path"))
    path = (given["model"] + given["model.class_path"] or [path])[-1]
    data = config.get("data")
    data_path = data if isinstance(data, str) else data.get("class_path") if isinstance(data, Mapping) else None
    if any(p and "." not in p for p in (path, data_path)) or _take(flags, ("data",))[1]["data"]:
        _import_apps()  # short names are looked up among the classes that are imported
    if not path:
        return None
    if "." not in path:
        return next((k for k in _all_subclasses(LightningModule) if k.__name__ == path), None)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None  # the parser reports a class that does not exist
        raise


def _all_subclasses(kind: type) -> list[type]:
    return [s for k in kind.__subclasses__() for s in (k, *_all_subclasses(k))]


def _import_apps() -> None:
    """Import every app's ``module`` and ``data``, so that their classes have short names."""
    for app in pkgutil.iter_modules(apps.__path__, "apps."):
        for part in ("module", "data") if app.ispkg else ():
            if importlib.util.find_spec(f"{app.name}.{part}") is not None:
                with contextlib.suppress(ImportError):  # an app whose optional library is missing
                    importlib.import_module(f"{app.name}.{part}")


# ---- checkpoints


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; tensors are mapped from the file, not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: damaged, cut short, or of another program") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return checkpoint


def _find_checkpoint(command: str, which: str | None, run_dir: Path) -> Path | None:
    folder = run_dir / "checkpoints"
    if which in ("null", "none"):
        return None
    if which is None:
        if command == "fit":
            return None
        for name in ("best", "last"):
            if (folder / f"{name}.ckpt").is_file():
                return folder / f"{name}.ckpt"
        raise FileNotFoundError(
            f"no checkpoint in {folder}: train one with moesaic fit, or give --ckpt_path (none: an untrained model)"
        )
    if which in ("last", "best"):
        path = folder / f"{which}.ckpt"
        if path.is_file():
            return path
        if command == "fit":
            print(f"no {path} yet: starting from the beginning")
            return None
        raise FileNotFoundError(f"no checkpoint {path}")
    return Path(which)


def _remembered(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments that the checkpoint remembers, if it is of the class the configuration names."""
    kind, hparams = checkpoint.get("module_class"), checkpoint.get("hyper_parameters")
    if not kind or not hparams:
        return {}
    model = config.get("model")
    named = model if isinstance(model, str) else model.get("class_path") if isinstance(model, Mapping) else None
    if named is not None and _short(named) != _short(kind):
        return {}
    return {"model": {"class_path": kind, "init_args": _without_fixed_classes(hparams)}}


def _without_fixed_classes(value: Any) -> Any:
    """Plain mappings in place of ``{"class_path", "init_args"}``, but for the parts that may be of several classes."""
    if isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}:
        args = {k: _without_fixed_classes(v) for k, v in value["init_args"].items()}
        module, _, name = value["class_path"].rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(f"the checkpoint needs {value['class_path']}, which cannot be imported") from None
        if isinstance(kind, type) and issubclass(kind, (core.RouterConfig, core.ExpertConfig)):
            return {"class_path": value["class_path"], "init_args": args}
        return args
    if isinstance(value, Mapping):
        return {k: _without_fixed_classes(v) for k, v in value.items()}
    return value


def check_fits(checkpoint: Mapping[str, Any], model: LightningModule, path: Path) -> None:
    """Refuse a checkpoint whose tensors are not the model's.

    Raises:
        ValueError: naming the options that differ, with both values.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    other = checkpoint.get("module_class", kind)
    if _short(other) != _short(kind):
        raise ValueError(f"{path} is of a {other}, and this run's model is a {kind}")
    saved = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items() if isinstance(v, Tensor)}
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    wrong = [k for k in {**own, **saved} if saved.get(k) != own.get(k)]
    if not wrong:
        return
    remembered, here = checkpoint.get("hyper_parameters", {}), getattr(model, "hparams", {})
    differing = _differences(_flat(remembered), _flat({k: to_plain(v) for k, v in here.items()}))
    tensor = wrong[0]
    detail = f"{tensor} is {saved.get(tensor, 'missing')} there and {own.get(tensor, 'missing')} here"
    if differing:
        clash = "; ".join(f"{k}={a} in the checkpoint, {b} here" for k, a, b in differing[:3])
        raise ValueError(f"{path} does not fit this model: {clash} ({detail})")
    raise ValueError(f"{path} does not fit this model: {detail}")


def _flat(value: Any, prefix: str = "model") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        if set(value) == {"class_path", "init_args"}:
            return {prefix: _short(value["class_path"]), **_flat(value["init_args"], prefix)}
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}").items()}
    return {prefix: value}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys((*here, *there))
    rows = [(k, there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]
    return [row for row in rows if not row[0].startswith(("model.optimizer", "model.ema_decay", "model.report"))]


# ---- output


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The predictions of a batch, an example each, as plain values."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    elif isinstance(batch, Mapping):
        columns = dict(batch)
    elif hasattr(batch, "_asdict"):
        columns = batch._asdict()
    else:
        columns = {"output": batch}
    plain = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in columns.items()}
    for values in zip(*plain.values(), strict=True):
        yield dict(zip(plain, values, strict=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notes and the warnings that do not help here; our own notes are printed."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric", "lightning")}
    own, handler = logging.getLogger("apps"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    own_level = own.level
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            for pattern in _UNHELPFUL_WARNINGS:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        own.removeHandler(handler)
        own.setLevel(own_level)
