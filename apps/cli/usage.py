"""Checks of a command line before anything heavy is imported: its text, its files, and the sources of its classes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.cli.classes import app_classes, defined, parameters, source
from apps.cli.errors import UsageError, unknown_option
from apps.cli.flags import ASKING, SECTIONS, asks, given
from apps.train.checkpoint_paths import NAMES, named_checkpoint
from apps.train.checkpoint_paths import find_checkpoint as find_in_run
from apps.train.offloading import read_budget
from apps.train.quantising import read_form

_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_OF_COMMAND = {"validate": ("verbose",), "test": ("verbose",), "predict": ("return_predictions",)}
ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
"""Endings of a file of predictions; each stands for a format."""
_READ = {"fit": ("root", "file", "train_file", "val_file"), "predict": ("predict_file", "predict_folder", "images")}
"""Options of the apps' data that name files a command needs. (``train_files`` of texts may be a prefix.)"""


def check_sections(config: Mapping[str, Any], path: Path) -> None:
    """Raise a ``UsageError`` for a top-level key of a configuration that no command has."""
    known = (*SECTIONS, "run_dir", *(name for names in _OF_COMMAND.values() for name in names))
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            rest = f"did you mean {near[0]!r}?" if near else f"there is {', '.join((*SECTIONS, 'run_dir'))}"
            raise UsageError(f"{path}: {key} does not exist; {rest}")


def check_options(command: str, flags: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise a ``UsageError`` for sections, classes and first-level options that do not exist.

    The parser checks deeper options, since it knows the types.
    """
    options = given(flags)
    trainer = [f"trainer.{name}" for name in parameters(_TRAINER) or ()]
    known = (*SECTIONS, *_OF_COMMAND.get(command, ()), *ASKING)
    for name, _ in options:
        section, _, rest = name.partition(".")
        if section not in known:
            raise UsageError(unknown_option(name, [*known[: -len(ASKING)], *trainer, "config", "run_dir"]))
        if section == "trainer" and rest:
            _check_trainer(rest, trainer)
    written = config.get("trainer")
    for key in written if isinstance(written, Mapping) else ():
        _check_trainer(str(key), trainer)
    paths = {part: named_class_path(part, options, config) for part in ("model", "data")}
    foreign = any(path and "." in path and not path.startswith("apps.") for path in paths.values())
    for part, path in paths.items():
        if path is not None:
            _check_class(part, path, foreign)
            _check_parameters(part, path, options, config)


def check_complete(command: str, which: str | None, flags: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise a ``UsageError`` for a command without a model or data, unless a checkpoint may name them."""
    if which not in (None, "null", "none", *NAMES) or asks(flags):
        return
    names = {name.partition(".")[0] for name, _ in given(flags)}
    missing = [part for part in ("model", "data") if part not in config and part not in names]
    if missing and (command == "fit" or len(missing) == 2):
        raise UsageError(
            f"{', '.join(missing)} missing: give a configuration, such as --config configs/vision/digits.yaml"
        )


def named_class_path(part: str, options: Sequence[tuple[str, str | None]], config: Mapping[str, Any]) -> str | None:
    """Return the class path of "model" or "data" that the flags name, else the configuration; None: neither does."""
    written = config.get(part)
    path = written if isinstance(written, str) else written.get("class_path") if isinstance(written, Mapping) else None
    named = [value for name, value in options if name in (part, f"{part}.class_path") and value]
    return named[-1] if named else path


def _check_trainer(name: str, known: Sequence[str]) -> None:
    dotted = f"trainer.{name.partition('.')[0]}"
    if known and name != "help" and dotted not in known:
        raise UsageError(unknown_option(f"trainer.{name}", known))


def _check_class(part: str, path: str, foreign: bool) -> None:
    module, _, name = path.rpartition(".")
    if not module:
        classes = app_classes(part)
        if not foreign and name.isidentifier() and name not in classes:  # a foreign one may be imported later
            raise UsageError(unknown_option(f"{part}={name}", classes, name))
        return
    if module.startswith("apps.") and source(module) is None:
        raise UsageError(unknown_option(f"{part}={path}", app_classes(part), name, listed=False))
    names = defined(module)
    if names is not None and name not in names:
        raise UsageError(unknown_option(f"{part}={path}", [*names, *app_classes(part)], name, listed=False))


def _check_parameters(
    part: str, path: str, options: Sequence[tuple[str, str | None]], config: Mapping[str, Any]
) -> None:
    known = parameters(path)
    if known is None:
        return
    written = config.get(part)
    names: list[str] = []
    if isinstance(written, Mapping) and written.get("class_path", path) == path:
        arguments = written.get("init_args") if "class_path" in written or "init_args" in written else written
        names += [str(key) for key in arguments or ()] if isinstance(arguments, Mapping) else []
    names += [name.partition(".")[2] for name, _ in options if name.startswith(f"{part}.")]
    for name in names:
        first = name.partition(".")[0]
        if first not in (*known, "class_path", "dict_kwargs", "help"):
            raise UsageError(unknown_option(f"{part}.{name}", known, first, owner=path))


def check_run_dir(run_dir: Path) -> None:
    """Raise a ``UsageError`` for a run's folder that is a file, or lies below one."""
    for path in (run_dir, *run_dir.parents):
        if path.exists():
            if not path.is_dir():
                below = "" if path == run_dir else f", and {path} is one"
                raise UsageError(
                    f"run_dir={run_dir} must be a folder, not {'below a file' if below else 'a file'}{below}"
                )
            return


def check_weights(command: str, weights: str | None, has_run_dir: bool) -> None:
    """Raise a ``UsageError`` for ``--weights`` of a command that trains nothing, or without a folder for its run.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    if weights is None:
        return
    if command != "fit":
        raise UsageError(f"weights is an option of fit, not of {command}: give --ckpt_path {weights}")
    if not has_run_dir:
        raise UsageError(f"weights={weights} begins a run of its own: give --run_dir, a folder for it")
    find_in_run(Path(weights))


def check_onnx(command: str, path: Path | None, which: str | None) -> None:
    """Raise a ``UsageError`` for ``--onnx`` of another command than predict, or beside a checkpoint."""
    if path is None:
        return
    if command != "predict":
        raise UsageError(f"onnx is an option of predict, not of {command}")
    if which is not None:
        raise UsageError(f"onnx={path} runs in place of a checkpoint: leave --ckpt_path {which} out")


def check_output(command: str, output: Path | None, overwrite: bool, raw_csv: bool) -> None:
    """Raise a ``UsageError`` for a file of predictions that cannot be written, or would replace an earlier one."""
    if command != "predict":
        given = {"output": output is not None, "overwrite": overwrite and command != "fit", "raw_csv": raw_csv}
        for name in (name for name, is_given in given.items() if is_given):
            also = "fit and " if name == "overwrite" else ""
            raise UsageError(f"{name} is an option of {also}predict, not of {command}")
        return
    if raw_csv and (output is None or output.suffix != ".csv"):
        raise UsageError("raw_csv is for predictions in CSV: give --output FILE.csv")
    if output is None:
        return
    if output.suffix not in ENDINGS:
        raise UsageError(f"output={output} must end in one of {', '.join(ENDINGS)} ({ENDINGS[-1]}: lines of text)")
    if output.is_dir():
        raise UsageError(f"output={output} is a folder: give a file")
    check_new(output, overwrite)


def check_open(command: str, opens: bool) -> None:
    """Raise a ``UsageError`` for a command that writes no page to be shown."""
    if opens and command not in ("test", "predict"):
        raise UsageError(f"open is an option of test, predict and compare, not of {command}")


def check_quantize(command: str, how: str | None, onnx: str | None) -> None:
    """Raise a ``UsageError`` for ``--quantize`` of a command that does not take it, with another word, or of a file
    that is exported already."""
    if how is None:
        return
    if onnx is not None:
        raise UsageError(f"quantize={how} is for a checkpoint, and onnx={onnx} is exported: give it to moesaic export")
    if command not in ("test", "predict"):
        raise UsageError(f"quantize is an option of test and predict, not of {command}")
    try:
        read_form(how)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_offload(command: str, how: str | None, onnx: str | None, sweeps: bool) -> None:
    """Raise a ``UsageError`` for ``--offload`` of a command that does not take it, with another text, or together with
    ``--onnx`` or ``--sweep``."""
    if how is None:
        return
    if command not in ("test", "predict"):
        raise UsageError(f"offload is an option of test and predict, not of {command}")
    if onnx is not None:
        raise UsageError(f"offload={how} is for a checkpoint, and onnx={onnx} runs in onnxruntime: leave one out")
    if sweeps:
        raise UsageError(f"offload={how} with sweep, which makes other models of the experts: leave it out")
    try:
        read_budget(how)
    except ValueError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class SweepOptions:
    """Options of ``moesaic test --sweep``.

    Attributes:
        rounds: rounds in which a form of the model and the trained model take turns.
        batches: validation batches from which the use of the experts is counted.

    Raises:
        UsageError: a number below 1.
    """

    rounds: int = 11
    batches: int = 8

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("batches", self.batches)):
            if value < 1:
                raise UsageError(f"{name}={value} must be at least 1")


def read_sweep(
    command: str, sweeps: bool, given: Mapping[str, Sequence[str]], quantize: str | None
) -> SweepOptions | None:
    """Return the options of ``--sweep``; None: it is not given.

    Args:
        command: fit, validate, test or predict.
        sweeps: whether ``--sweep`` is given.
        given: texts of its options, by name; the last one counts.
        quantize: value of ``--quantize``.

    Raises:
        UsageError: another command than test, an option without ``--sweep``, one that is no whole number, or a model
            that is to be quantised before.
    """
    texts = {name: values[-1] for name, values in given.items() if values}
    if sweeps and command != "test":
        raise UsageError(f"sweep is an option of test, not of {command}")
    if sweeps and quantize is not None:
        raise UsageError(f"quantize={quantize} with sweep, which quantises the model by itself: leave it out")
    if not sweeps:
        for name, text in texts.items():
            raise UsageError(f"{name}={text} is an option of moesaic test --sweep")
        return None
    numbers = {}
    for name, text in texts.items():
        if not text.isdecimal():
            raise UsageError(f"{name}={text} must be a whole number of at least 1")
        numbers[name] = int(text)
    return SweepOptions(**numbers)


def check_new(path: Path, overwrite: bool) -> None:
    """Raise a ``UsageError`` for a file that exists, unless ``overwrite`` is set."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: --overwrite replaces it, --output FILE writes another")


def find_checkpoint(command: str, which: str | None, run_dir: Path) -> Path | None:
    """Return the checkpoint that a command is of; whether it can be read shows when it is read.

    Args:
        command: fit, validate, test or predict.
        which: value of ``--ckpt_path``; None: it is not given.
        run_dir: the run's folder.

    Returns:
        The path; None for an untrained model, or a training that begins anew.

    Raises:
        FileNotFoundError: there is none.
    """
    if which in ("null", "none") or (which is None and command == "fit"):
        return None
    try:
        return find_in_run(run_dir) if which is None else named_checkpoint(which, run_dir)
    except FileNotFoundError:
        if which is None:
            raise FileNotFoundError(
                f"no checkpoint in {run_dir / 'checkpoints'}: train one with moesaic fit, or give --ckpt_path (none: "
                "an untrained model)"
            ) from None
        if which in NAMES and command == "fit":
            return None
        raise


def check_data_files(command: str, flags: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a file or folder of an app's data that is not there; patterns are not looked at."""
    options = given(flags)
    if command not in _READ or named_class_path("data", options, config) not in app_classes("data").values():
        return
    written = config.get("data")
    arguments = dict(written.get("init_args") or {}) if isinstance(written, Mapping) else {}
    arguments |= {name.removeprefix("data."): value for name, value in options if name.startswith("data.")}
    root = arguments.get("root")
    for name in _READ[command]:
        value = arguments.get(name)
        if not isinstance(value, str) or re.search(r"[][*?{}]", value):
            continue
        places = [Path(value), Path(root, value)] if isinstance(root, str) else [Path(value)]
        if value not in ("-", "null", "~", "") and not any(path.expanduser().exists() for path in places):
            raise ValueError(f"{name}={value!r} cannot be read: No such file or directory")
