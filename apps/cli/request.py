"""``Request``: the command line and its configurations, as far as the parser needs to know beforehand.

Modules that import torch are imported after the checks that need none, so that an error of usage is shown at once.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.base.progress import is_first_process
from apps.cli.classes import find_class, load_class, with_long_names
from apps.cli.configs import at, dotted, merge, own_classes, read_config
from apps.cli.early import check_early
from apps.cli.errors import UsageError, describe, unknown_option
from apps.cli.flags import SECTIONS, asks_for_help, given, wants_text, with_classes, with_flags
from apps.cli.options import COMMANDS, Fit, Predict, RunOptions
from apps.cli.parser import folder
from apps.cli.values import MissingError
from apps.train.checkpoint.paths import NAMES, find_checkpoint, named_checkpoint, run_name

if TYPE_CHECKING:
    from apps.train.publish.exported import ExportedModel

_DEVICE = ("accelerator", "devices", "num_nodes", "strategy")
"""Options of the trainer that are of the machine of a training."""


@dataclass(frozen=True)
class Request:
    """A command line, read as far as the parser needs to know beforehand.

    Attributes:
        command: fit, validate, test or predict.
        words: the command line as it was given, after the command.
        options: the command's own options.
        flags: the values of the configuration that were given, ``--KEY.SUBKEY VALUE``.
        config: the configurations merged, later ones over earlier ones, over the checkpoint's arguments, and the flags
            over all.
        run_dir: folder of the run's files.
        checkpoint: the file to load, or None.
        loaded: the checkpoint's contents, with only the shapes of sharded tensors, or None.
        model_class: the model's class, if it is named.
        weights: the checkpoint of ``--weights``, whose weights a new training starts from, or None.
        start_checkpoint: contents of the checkpoint that ``--weights`` or ``model.grow`` names, if the run starts from
            its weights and loads no other; or None.
        exported: the model of ``--onnx``, which runs instead of a checkpoint's weights, or None.
        from_checkpoint: arguments of the data that a run which resumes has from its own checkpoint, and not from its
            user.
        layers: the configurations that were merged, by the file of each, the checkpoint's arguments first.
    """

    command: str
    words: tuple[str, ...]
    options: RunOptions
    flags: tuple[str, ...]
    config: Mapping[str, Any]
    run_dir: Path
    checkpoint: Path | None
    loaded: Mapping[str, Any] | None
    model_class: type | None
    weights: Path | None = None
    start_checkpoint: Mapping[str, Any] | None = None
    exported: ExportedModel | None = None
    from_checkpoint: tuple[str, ...] = ()
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, command: str, argv: list[str], announces: bool = False) -> Request:
        """Read ``moesaic COMMAND ARGV``.

        Args:
            command: fit, validate, test or predict.
            argv: the words after it.
            announces: whether to announce the command, once the command line has passed the quick checks.

        Raises:
            UsageError: an option or a configuration is wrong.
            FileNotFoundError: the checkpoint does not exist.
            ValueError: the checkpoint is damaged, or the data are missing.
        """
        options = COMMANDS[command].read(argv)
        given_weights = options.weights if isinstance(options, Fit) else None
        onnx = options.onnx if isinstance(options, Predict) else None
        flags, which, paths = [*options.rest], options.ckpt_path, options.config
        exported = None if onnx is None else _opened(onnx)
        own = own_classes([*map(str, paths), *flags])
        config: dict[str, Any] = {}
        layers: dict[str, Mapping[str, Any]] = {}
        for path in paths:
            layers[str(path)] = layer = read_config(path)
            _check_sections(layer, path)
            config = merge(config, layer)
        has_run = options.run_dir is not None and onnx is None and (which in NAMES or command != "fit")
        named = which if which not in (None, *NAMES) else given_weights
        beside = None if paths else _config_beside(named, options.run_dir if has_run else None)
        if beside is not None:  # ``check_beside`` looks at all of it, below
            paths, config = (beside,), read_config(beside)
            layers[str(beside)] = config
        if exported is not None and exported.description.data is not None:
            config = merge(with_long_names({"data": exported.description.data}), config)
        written = config.pop("run_dir", None)  # of a run that was put aside, at its old place
        which = which or config.get("ckpt_path")
        config.pop("ckpt_path", None)
        stem = "-".join(path.stem for path in (paths if onnx is None else [onnx])) or "unnamed"
        run_dir = options.run_dir or (beside.parent if beside else folder(Path(written or Path("runs", stem))))
        if given_weights is not None and options.run_dir is None and which in (None, "null", "none", *NAMES):
            run_dir = _tuned(find_checkpoint(given_weights), run_dir if options.config else None)
        if which in (None, "null", "none", *NAMES) and given_weights is None and onnx is None and not wants_text(flags):
            _check_complete(command, flags, config)
        try:
            no_checkpoint = asks_for_help(flags) or onnx is not None
            checkpoint = None if no_checkpoint else _find_checkpoint(command, which, run_dir)
        except FileNotFoundError:
            if which is not None or not wants_text(flags):
                raise
            checkpoint = None  # a configuration can be printed without one
        if not asks_for_help(flags):
            with naming_origins(options.rest, layers):
                check_early(with_flags({} if beside else with_long_names(config), flags))
        if not wants_text(flags):
            if announces:
                read = str(onnx or "") or " + ".join(map(str, paths)) or (which if which not in (None, *NAMES) else "")
                written_to = options.output if isinstance(options, Predict) else run_dir
                _announce(command, " ".join(filter(None, (command, read, f"-> {written_to}" if written_to else ""))))
                if command == "predict" and checkpoint is not None:  # the others name it next to their figures
                    _announce(command, f"checkpoint: {checkpoint}")
            if which in NAMES and checkpoint is None:
                print(f"no {run_dir / 'checkpoints' / which}.ckpt yet: starting from the beginning")

        source, from_checkpoint = onnx or checkpoint, tuple[str, ...]()
        if source is None and given_weights is None and not asks_for_help(flags):
            with naming_origins(options.rest, layers):
                check_early(with_flags(with_long_names(config), flags), with_core=True)
        from apps.cli.checkpoint import check_superseded, remembered, with_remembered_data
        from apps.cli.defaults import with_stand_ins
        from apps.train.checkpoint.contents import read_checkpoint
        from apps.train.checkpoint.loading import check_beside
        from apps.train.checkpoint.run_folder import is_own

        for name in own if source or beside or given_weights else ():  # a checkpoint may name them then
            load_class(name)  # a missing one is reported where it is looked up
        if beside is not None:
            # An evaluation takes one device; a resumed training is sharded as it was, on any kind of device.
            config, left_out = check_beside(config, beside, _DEVICE[:1] if command == "fit" else _DEVICE)
            lost = f"{', '.join(left_out)} (--config {beside} takes all of it)"
            if left_out and command == "fit":
                raise UsageError(f"{beside} lies beside the checkpoint, and the training would be without {lost}")
            note = f"; left out: {lost}" if left_out else ""
            print(f"configuration: {beside}, which lies beside the checkpoint{note}", file=sys.stderr)
        config, loaded = with_long_names(with_classes(config, flags)), None
        if source is not None:
            loaded = exported.checkpoint if exported is not None else read_checkpoint(source, shapes_only=True)
            kept = remembered(loaded, config, find_class("model", config), source)
            config, layers = merge(kept, config), {str(source): kept, **layers}
            filled = with_remembered_data(config, flags, loaded)
            if command == "fit" and is_own(source, run_dir):
                names = getattr(find_class("data", filled), "from_checkpoint", ())
                from_checkpoint = tuple(n for n in names if at(filled, ("data", n)) is not at(config, ("data", n)))
            config = filled
            check_superseded(config, flags, source)
        if command == "fit" and loaded is not None and "optimizer_states" not in loaded:
            raise UsageError(f"{checkpoint} has no optimizer state to continue with: start a new run with --weights")
        # A resumed run has its weights from its own checkpoint.
        weights = find_checkpoint(given_weights) if given_weights is not None and loaded is None else None
        start = weights or (_grown_from(config, flags) if command == "fit" and loaded is None else None)
        start_checkpoint = None if start is None else read_checkpoint(start, shapes_only=True)
        if start is not None and start_checkpoint is not None:
            if weights is not None:
                kind = find_class("model", config)
                kept = remembered(start_checkpoint, config, kind, start, data_may_grow=True)
                config, layers = merge(kept, config), {str(start): kept, **layers}
            config = with_remembered_data(config, flags, start_checkpoint)
            check_superseded(config, flags, start)
        for part in ("model", "data"):
            config = with_stand_ins(part, flags, config)
        config = with_long_names(with_flags(config, flags))
        return cls(
            command,
            tuple(argv),
            options,
            tuple(flags),
            config,
            run_dir,
            checkpoint,
            loaded,
            find_class("model", config),
            weights,
            start_checkpoint,
            exported,
            from_checkpoint,
            layers,
        )

    def naming_origins(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which an error on a value names the flag or the file of it."""
        return naming_origins(self.options.rest, self.layers)

    @property
    def command_line(self) -> str:
        """Return the shell command that was given."""
        return shlex.join(["moesaic", self.command, *self.words])

    @property
    def sparsifies(self) -> bool:
        """Return whether there is a section ``sparsify``."""
        return self.config.get("sparsify") is not None


@contextlib.contextmanager
def naming_origins(flags: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Have an error on the value of an option name the flag or the file that the value came from, if one did.

    Args:
        flags: the flags that were given.
        layers: the configurations that were merged, by the file of each, in their order.
    """
    try:
        yield
    except ValueError as error:
        if type(error) not in (UsageError, MissingError, ValueError):
            raise
        line, code = describe(error)
        raise (UsageError if code == 2 else ValueError)(_with_origin(line, flags, layers)) from error


def _with_origin(line: str, flags: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> str:
    match = re.match(r"[\w.]+(?==| does not exist| is | has | needs )", line)
    if match is None:
        return line
    names = (flag for flag, _ in given(flags))
    origins = [("--", names), *((f"{path}: ", dotted(layer)) for path, layer in reversed([*layers.items()]))]
    for origin, options in origins:
        own = [name for name in options if f".{name}".endswith(f".{match[0]}")]
        if own:  # an earlier file is hidden by this one, even where it is unclear which of its values is meant
            return f"{origin}{own[0]}{line[match.end() :]}" if len(own) == 1 else line
    return line


def _announce(command: str, line: str) -> None:
    """Announce the command, before the seconds that torch takes. The stdout of predict is for its predictions."""
    if is_first_process():  # the processes of a distributed run have one command line
        print(line, file=sys.stderr if command == "predict" else None, flush=True)


def _opened(path: Path) -> ExportedModel:
    """Return the exported model at ``path``."""
    from apps.train.publish.exported import ExportedModel

    return ExportedModel.read(path)


def _check_sections(config: Mapping[str, Any], path: Path) -> None:
    """Raise a ``UsageError`` for a top-level key of a configuration that no command has."""
    for key in config:
        if key not in (known := (*SECTIONS, "run_dir")):
            raise UsageError(f"{path}: {unknown_option(str(key), known)}")


def _check_complete(command: str, flags: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise a ``UsageError`` for a command without a model or data, which no checkpoint names."""
    names = {name.partition(".")[0] for name, _ in given(flags)}
    missing = [part for part in ("model", "data") if part not in config and part not in names]
    if missing and (command == "fit" or len(missing) == 2):
        raise UsageError(
            f"{', '.join(missing)} missing: give a configuration, such as --config configs/vision/digits.yaml"
        )


def _find_checkpoint(command: str, which: str | None, run_dir: Path) -> Path | None:
    """Return the checkpoint of a command; whether it can be read shows when it is read.

    Args:
        command: fit, validate, test or predict.
        which: value of ``--ckpt_path``; None: it is not given.
        run_dir: the run's folder.

    Returns:
        The path; None for an untrained model, or for a new training.

    Raises:
        FileNotFoundError: there is none.
    """
    if which in ("null", "none") or (which is None and command == "fit"):
        return None
    try:
        return find_checkpoint(run_dir) if which is None else named_checkpoint(which, run_dir)
    except FileNotFoundError:
        if which is None:
            raise FileNotFoundError(
                f"no checkpoint in {run_dir / 'checkpoints'}: train one with moesaic fit, or give --ckpt_path (none: "
                "an untrained model)"
            ) from None
        if which in NAMES and command == "fit":
            return None
        raise


def _config_beside(which: str | None, run: Path | None) -> Path | None:
    """Return the configuration in the folder of a checkpoint's run, else in ``run``; None: neither."""
    try:
        path = run if which is None else None if which in ("null", "none") else find_checkpoint(which).parent.parent
    except FileNotFoundError:  # reported below, after the checks of the options
        return None
    return path / "config.yaml" if path is not None and (path / "config.yaml").is_file() else None


def _tuned(weights: Path, run_dir: Path | None) -> Path:
    """Return the folder of a run that begins with weights: ``run_dir``, unless their own run is there or it is None."""
    own = weights.resolve()
    run_dir = run_dir or Path("runs", f"{run_name(weights).replace('/', '_')}_tuned")
    while own.is_relative_to(run_dir.resolve()) and not own.is_relative_to(run_dir.resolve() / "earlier"):
        run_dir = run_dir.with_name(f"{run_dir.name}_tuned")
    return folder(run_dir)


def _grown_from(config: Mapping[str, Any], flags: list[str]) -> Path | None:
    """Return the checkpoint that ``model.grow`` names; None if there is none."""
    path = dict(given(flags)).get("model.grow.checkpoint") or at(config, ("model", "init_args", "grow", "checkpoint"))
    try:
        return None if path is None else find_checkpoint(str(path))
    except FileNotFoundError:  # the training that needs it says so
        return None
