"""``Request``: the command line and its configurations, as far as the parser needs to know beforehand.

Modules that import torch are imported after the checks that need none, so that an error of usage is shown at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import shlex
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from apps.base.files import naming
from apps.cli import UsageError, usage
from apps.cli.classes import load_class, with_long_flags, with_long_names
from apps.cli.configs import at, merge, own_classes, read_config, shipped
from apps.cli.flags import NULLS, asks, asks_for_help, given, switch, take, verbatim, with_flags, with_nulls
from apps.registry import subclasses
from apps.train.checkpoint_paths import NAMES, find_checkpoint

if TYPE_CHECKING:
    from apps.train.exported import ExportedModel

SWEEP = tuple(field.name for field in dataclasses.fields(usage.SweepOptions))
"""Options of ``--sweep``."""

_DEVICE = ("accelerator", "devices", "num_nodes", "strategy")
"""Options of the trainer that are of the machine of a training."""

_TEXTS = ("text", "query", "query_image")
"""Options of the data that are texts, and no YAML."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line, read as far as the parser needs to know beforehand.

    Attributes:
        command: fit, validate, test or predict.
        flags: the arguments but for the configurations, --run_dir and --ckpt_path.
        config: the configurations merged, later ones over earlier ones, over the checkpoint's arguments.
        run_dir: folder of the run's files.
        checkpoint: the file to load, or None.
        loaded: the checkpoint's contents, with the shapes alone of sharded tensors, or None.
        model_class: the model's class, where it is named.
        output: the file of the predictions; None: the run's own.
        overwrite: whether an earlier file of predictions is replaced, or the run in the folder of a training removed.
        raw_csv: whether a CSV file of predictions has texts that a spreadsheet would compute as they are.
        weights: the checkpoint of ``--weights``, with whose weights a training begins anew, or None.
        begun_with: contents of the checkpoint that ``--weights`` or ``model.grow`` names, where the run begins with its
            weights and loads no other; or None.
        opens: whether the report of a test is shown in the browser.
        quantize: how the experts are quantised, such as "int4:64", or None.
        offload: how the experts are offloaded, such as "64MB", or None.
        sweep: options of ``--sweep``, which tests cheaper forms of the model as well; None: it is not asked for.
        words: the command line as it was given, after the command.
        exported: the model of ``--onnx``, which runs in place of a checkpoint's weights, or None.
    """

    command: str
    flags: tuple[str, ...]
    config: Mapping[str, Any]
    run_dir: Path
    checkpoint: Path | None
    loaded: Mapping[str, Any] | None
    model_class: type | None
    output: Path | None = None
    overwrite: bool = False
    raw_csv: bool = False
    weights: Path | None = None
    begun_with: Mapping[str, Any] | None = None
    opens: bool = False
    quantize: str | None = None
    offload: str | None = None
    sweep: usage.SweepOptions | None = None
    words: tuple[str, ...] = ()
    exported: ExportedModel | None = None

    @classmethod
    def read(cls, command: str, argv: list[str], announce: Callable[[str], None] | None = None) -> Request:
        """Read ``moesaic COMMAND ARGV``.

        Args:
            command: fit, validate, test or predict.
            argv: the words after it.
            announce: function that takes a line on what starts, once the command line has passed the quick checks.

        Raises:
            UsageError: an option or a configuration is wrong.
            FileNotFoundError: the checkpoint does not exist.
            ValueError: the checkpoint is damaged, or the data are missing.
        """
        words = tuple(argv)
        argv, overwrite = switch(argv, "overwrite")
        argv, raw_csv = switch(argv, "raw_csv")
        argv, opens = switch(argv, "open")
        usage.check_open(command, opens)
        argv, sweeps = switch(argv, "sweep")
        names = ("config", "c", "run_dir", "ckpt_path", "weights", "output", "onnx", "quantize", "offload", *SWEEP)
        flags, options = take(argv, names)
        quantize = options["quantize"][-1] if options["quantize"] else None
        usage.check_quantize(command, quantize, next(iter(options["onnx"]), None))
        offload = options["offload"][-1] if options["offload"] else None
        usage.check_offload(command, offload, next(iter(options["onnx"]), None), sweeps)
        sweep = usage.read_sweep(command, sweeps, {name: options[name] for name in SWEEP}, quantize)
        output = Path(options["output"][-1]) if options["output"] else None
        flags = with_long_flags(
            verbatim(flags, [f"data.{part}{name}" for part in ("", "init_args.") for name in _TEXTS])
        )
        paths = [shipped(Path(p)) for p in options["config"] + options["c"]]
        which = options["ckpt_path"][-1] if options["ckpt_path"] else None
        given_weights = options["weights"][-1] if options["weights"] else None
        usage.check_weights(command, given_weights, bool(options["run_dir"]))
        onnx = Path(options["onnx"][-1]) if options["onnx"] else None
        usage.check_onnx(command, onnx, which)
        exported = None if onnx is None else _opened(onnx)
        has_run = options["run_dir"] and onnx is None and (which in NAMES or command != "fit")
        named = which if which not in (None, *NAMES) else given_weights
        own = own_classes([*map(str, paths), *flags])
        beside = None if paths else _config_beside(named, options["run_dir"][-1] if has_run else None)
        config: dict[str, Any] = {}
        for path in paths:
            layer = read_config(path)
            usage.check_sections(layer, path)
            config = merge(config, with_long_names(layer))
        if beside is not None:  # ``check_beside`` looks at all of it, below
            paths, config = [beside], with_long_names(read_config(beside))
        if exported is not None and exported.description.data is not None:
            config = merge(with_long_names({"data": exported.description.data}), config)
        written = config.pop("run_dir", None)  # of a run that was put aside, where it was
        run_dir = options["run_dir"][-1] if options["run_dir"] else beside.parent if beside is not None else written
        config, flags = with_nulls(config, flags)
        which = which or config.get("ckpt_path")
        config.pop("ckpt_path", None)
        stems = [path.stem for path in ([*paths] if onnx is None else [onnx])]
        run_dir = Path(run_dir) if run_dir else Path("runs") / ("-".join(stems) or "unnamed")
        usage.check_options(command, flags, {} if beside is not None else config)
        usage.check_complete(command, which or given_weights or (None if onnx is None else str(onnx)), flags, config)
        usage.check_run_dir(run_dir)
        if not asks(flags):
            usage.check_output(command, output, overwrite, raw_csv)
        try:
            no_checkpoint = asks_for_help(flags) or onnx is not None
            checkpoint = None if no_checkpoint else usage.find_checkpoint(command, which, run_dir)
        except FileNotFoundError:
            if which is not None or not asks(flags):
                raise
            checkpoint = None  # a configuration can be printed without one
        if not asks(flags):
            usage.check_data_files(command, flags, config)
            if announce is not None:
                read = str(onnx or "") or " + ".join(map(str, paths)) or (which if which not in (None, *NAMES) else "")
                written_to = output if command == "predict" else run_dir
                announce(" ".join(filter(None, (command, read, f"-> {written_to}" if written_to else ""))))
                if command == "predict" and checkpoint is not None:  # the others name it beside their figures
                    announce(f"checkpoint: {checkpoint}")
            if which in NAMES and checkpoint is None:
                print(f"no {run_dir / 'checkpoints' / which}.ckpt yet: starting from the beginning")

        from apps.cli.checkpoint import remembered
        from apps.train.contents import read_checkpoint
        from apps.train.loading import check_beside

        source = onnx or checkpoint
        for name in own if source or beside or given_weights else ():  # a checkpoint may name them then
            load_class(name)  # a missing one is reported where it is looked up
        if beside is not None:
            # An evaluation takes one device; a training that goes on is divided as it was, on any kind of device.
            config, left_out = check_beside(config, beside, _DEVICE[:1] if command == "fit" else _DEVICE)
            lost = f"{', '.join(left_out)} (--config {beside} takes all of it)"
            if left_out and command == "fit":
                raise UsageError(f"{beside} lies beside the checkpoint, and the training would be without {lost}")
            note = f"; left out: {lost}" if left_out else ""
            print(f"configuration: {beside}, which lies beside the checkpoint{note}", file=sys.stderr)
        loaded = None
        if source is not None:
            loaded = exported.checkpoint if exported is not None else read_checkpoint(source, shapes_only=True)
            config = merge(remembered(loaded, config, _find_class("model", flags, config), source), config)
            config = _with_remembered_data(config, flags, loaded)
            _check_superseded(config, flags, source)
        if command == "fit" and loaded is not None and "optimizer_states" not in loaded:
            raise UsageError(f"{checkpoint} has no optimizer's state to go on with: begin anew, --weights")
        # A run that goes on has its weights from its own checkpoint.
        weights = find_checkpoint(given_weights) if given_weights is not None and loaded is None else None
        start = weights or (_grown_from(config, flags) if command == "fit" and loaded is None else None)
        begun_with = None if start is None else read_checkpoint(start, shapes_only=True)
        if start is not None and begun_with is not None:
            if weights is not None:
                kind = _find_class("model", flags, config)
                config = merge(remembered(begun_with, config, kind, start, data_may_grow=True), config)
            config = _with_remembered_data(config, flags, begun_with)
            _check_superseded(config, flags, start)
        for part in ("model", "data"):
            config = _with_stand_ins(part, flags, config)
        config, rest = _with_own_defaults(config, flags)
        flags = rest if not asks_for_help(flags) else flags
        model_class = _find_class("model", flags, config)
        return cls(
            command,
            tuple(flags),
            config,
            run_dir,
            checkpoint,
            loaded,
            model_class,
            output,
            overwrite,
            raw_csv,
            weights,
            begun_with,
            opens,
            quantize,
            offload,
            sweep,
            words,
            exported,
        )

    @property
    def command_line(self) -> str:
        """Return the shell command that was given."""
        return shlex.join(["moesaic", self.command, *self.words])

    @property
    def sparsifies(self) -> bool:
        """Return whether there is a section ``sparsify``."""
        return self.config.get("sparsify") is not None

    @contextlib.contextmanager
    def config_file(self) -> Iterator[str | None]:
        """Write the merged configuration to a file for the parser, and remove it in the end."""
        if not self.config:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
            path = Path(folder) / "config.yaml"
            with naming(path):
                path.write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
            yield str(path)


def _opened(path: Path) -> ExportedModel:
    """Return the exported model at ``path``."""
    from apps.train.exported import ExportedModel

    return ExportedModel.read(path)


def _config_beside(which: str | None, run: str | None) -> Path | None:
    """Return the configuration in the folder of the run that a checkpoint lies in, else in ``run``; None: neither."""
    if which in ("null", "none") or (which is None and run is None):
        return None
    try:
        path = Path(str(run)) if which is None else find_checkpoint(which).parent.parent
    except FileNotFoundError:  # reported below, after the checks of the options
        return None
    return path / "config.yaml" if (path / "config.yaml").is_file() else None


def _grown_from(config: Mapping[str, Any], flags: list[str]) -> Path | None:
    """Return the checkpoint that ``model.grow`` names; None where there is none."""
    path = dict(given(flags)).get("model.grow.checkpoint") or at(config, ("model", "init_args", "grow", "checkpoint"))
    try:
        return None if path is None else find_checkpoint(str(path))
    except FileNotFoundError:  # the training that needs it says so
        return None


def _with_remembered_data(config: Mapping[str, Any], flags: list[str], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the arguments of the data that the data's class names in ``from_checkpoint``.

    They come from the checkpoint's model, which has arguments of the same names, unless they are written by hand.
    """
    from core.config.plain import arguments_from_plain

    kind = _find_class("data", flags, config)
    names = getattr(kind, "from_checkpoint", ())
    written = config.get("data")
    written = written if isinstance(written, Mapping) else {}
    arguments = written["init_args"] or {} if "init_args" in written else written
    hparams = checkpoint.get("hyper_parameters") or {}
    filled = {}
    for name in names:
        option = re.compile(rf"--data\.(init_args\.)?{name}([.=+].*)?", re.DOTALL)
        by_hand = any(option.fullmatch(flag) for flag in flags)
        if not by_hand and arguments.get(name) is None and hparams.get(name) is not None:
            filled[name] = hparams[name]
    if not filled or kind is None:
        return dict(config)
    arguments_from_plain(kind, filled, "the checkpoint: data")
    path = usage.named_class_path("data", given(flags), config)
    arguments = {k: v for k, v in arguments.items() if k != "class_path"}
    return {**config, "data": {"class_path": path, "init_args": {**arguments, **filled}}}


def _with_stand_ins(part: str, flags: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the values in force where an argument of the model or data is null or not given.

    See ``SparseModule.defaults_of_none``. A null that stands for nothing, such as "no MoE layer", stays.
    """
    kind, path = _find_class(part, flags, config), usage.named_class_path(part, given(flags), config)
    stand_ins = getattr(kind, "defaults_of_none", None)
    written = config.get(part)
    written = {"class_path": written} if isinstance(written, str) else dict(written or {})
    if stand_ins is None or written.get("class_path", path) != path:
        return dict(config)

    from core.config.plain import to_plain

    arguments = written.get("init_args") or {} if {"class_path", "init_args"} & written.keys() else written
    options = ((name.removeprefix(f"{part}."), value) for name, value in given(flags))
    by_flag = {name: None if value in NULLS else value for name, value in options}
    filled = {
        name: to_plain(value, type(value))
        for name, value in stand_ins({**arguments, **by_flag}).items()
        # A flag that names a class, or the whole, begins from nothing: it would keep the stand-in's arguments.
        if arguments.get(name) is None and not {name, f"{name}.class_path"} & by_flag.keys()
    }
    others = {"dict_kwargs": written["dict_kwargs"]} if "dict_kwargs" in written else {}
    return {**config, part: {"class_path": path, "init_args": {**arguments, **filled}, **others}}


def _with_own_defaults(config: Mapping[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``config`` with every option of the config classes that it or the flags name, and the other flags.

    (Where another class than a default's is named, jsonargparse keeps the default's values of options with the same
    name: ``core.SwiGLU`` in place of a default ``FFN(activation="gelu")`` would compute GELU.)

    Example::

        with_own_defaults({"model": {"expert": {"class_path": "core.SwiGLU"}}}, [])
        # {"model": {"expert": {"class_path": "core.SwiGLU", "init_args": {"activation": "silu", ...}}}}, []
    """

    def is_taken(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        model = merged.get("model")
        inside = names[0] == "model" and len(names) > 1 and isinstance(model, Mapping) and "class_path" in model
        # A null of a class that an earlier flag names, as ``with_nulls`` takes one of a class in a file.
        is_null = value in NULLS and isinstance(at(merged, names[:-1]), Mapping)
        return names[0] == "sparsify" or (inside and (is_null or _config_class(value) is not None))

    def plain(value: str) -> Any:
        return yaml.safe_load(value) if _config_class(value) is None else {"class_path": value}

    # All flags of sparsify are laid over the file's: the parser would take an abbreviated one.
    merged, rest = with_flags(config, flags, is_taken, plain)
    return {k: _filled(v) if k in ("model", "sparsify") else v for k, v in merged.items()}, rest


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    inner = {k: _filled(v) for k, v in value.items()}
    kind = _config_class(value["class_path"]) if "class_path" in value else None
    if kind is None:
        return inner

    from core.config.plain import to_plain

    own, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.default is not dataclasses.MISSING:
            own[field.name] = to_plain(field.default, hints[field.name])
        elif field.init and field.default_factory is not dataclasses.MISSING:
            own[field.name] = to_plain(field.default_factory(), hints[field.name])
    given = inner.get("init_args")
    return {**inner, "init_args": {**own, **(given if isinstance(given, Mapping) else {})}}


def _config_class(name: Any) -> Any:
    """Return the config class that the user names, imported if need be; None where it is none, as a typing error."""
    import core

    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return None
    if name.partition(".")[0] not in ("core", "apps"):
        with contextlib.suppress(ImportError):  # the parser reports it
            load_class(name)
    try:
        return core.registered_config(name)
    except ValueError:
        return None


def _check_superseded(config: Mapping[str, Any], flags: list[str], checkpoint: Path) -> None:
    """Refuse flags that have no effect beside what the checkpoint remembers: ``superseded`` of the data's class.

    Flags that the checkpoint's run was given too may stay.

    Raises:
        UsageError: a flag has no effect; the message names it.
    """
    kind = _find_class("data", flags, config)
    for name, by in getattr(kind, "superseded", {}).items():
        if at(config, ("data", "init_args", by)) is None:
            continue
        beside = checkpoint.parent.parent / "config.yaml"
        of_run = at(read_config(beside), ("data", "init_args")) if beside.is_file() else None
        option = re.compile(rf"--data\.(?:init_args\.)?({name}(?:\.\w+)*)(?:=(.*))?", re.DOTALL)
        for flag, following in itertools.pairwise([*flags, ""]):
            if not (match := option.fullmatch(flag)):
                continue
            value, known = yaml.safe_load(match[2] or following), at(of_run, match[1].split("."))
            both = isinstance(value, Mapping) and isinstance(known, Mapping)
            if known != (merge(known, value) if both else value):
                raise UsageError(
                    f"data.{match[1]}={value} has no effect: {checkpoint} brings its {by} along; leave it out"
                )


def _find_class(part: str, flags: list[str], config: Mapping[str, Any]) -> type | None:
    """Return the class of "model" or "data"; None where none is named, or there is no such class."""
    path = usage.named_class_path(part, given(flags), config)
    if not path:
        return None
    if "." in path:
        return load_class(path)

    from lightning.pytorch import LightningDataModule, LightningModule

    base = LightningDataModule if part == "data" else LightningModule
    return next((k for k in subclasses(base) if k.__name__ == path), None)
