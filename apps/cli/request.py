"""What the user asked for: the command line and its configurations, as far as the parser needs to know beforehand.

What takes torch is imported where it is used, after the checks that need none: an error of usage is shown at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import itertools
import json
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from apps.base.files import CONFIGS, naming
from apps.cli import UsageError, usage
from apps.cli.classes import long_name, short
from apps.cli.errors import subclasses

_QUOTED_LIST = re.compile(
    r"""\[\s*(?:(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?:,\s*|(?=\])))*\]""",
    re.DOTALL,
)
_NULLS = ("null", "Null", "NULL", "~")
_ESCAPED_IN_YAML = re.compile("[\x7f-\x9f\ufeff\u2028\u2029]")


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
        output: the file of the predictions; None: the run's own.
        overwrite: replace an earlier file of predictions.
    """

    command: str
    flags: tuple[str, ...]
    config: Mapping[str, Any]
    run_dir: Path
    checkpoint: Path | None
    model_class: type | None
    output: Path | None = None
    overwrite: bool = False

    @classmethod
    def read(cls, command: str, argv: list[str], announce: Callable[[str], None] | None = None) -> Request:
        """Read ``moesaic COMMAND ARGV``.

        Args:
            command: fit, validate, test or predict.
            argv: what follows it.
            announce: called with a line that says what starts, once the command line has passed the quick checks.

        Raises:
            UsageError: a wrong option or configuration.
            FileNotFoundError: no such checkpoint.
            ValueError: a damaged checkpoint, or data that are not there.
        """
        argv, overwrite = switch(argv, "overwrite")
        flags, options = take(argv, ("config", "c", "run_dir", "ckpt_path", "output"))
        output = Path(options["output"][-1]) if options["output"] else None
        flags = verbatim(flags, ("data.text", "data.init_args.text"))
        paths = [shipped(Path(p)) for p in options["config"] + options["c"]]
        found_in: Path | None = None
        which = options["ckpt_path"][-1] if options["ckpt_path"] else None
        if not paths and which not in (None, *usage.NAMES, "null", "none"):
            # A checkpoint lies in its run's folder, beside the configuration of the run.
            beside = Path(which).parent.parent / "config.yaml"
            if beside.is_file():
                paths, found_in = [beside], beside.parent
        config: dict[str, Any] = {}
        for path in paths:
            layer = _read_yaml(path)
            if found_in is None:  # else ``check_beside`` looks at all of it
                usage.check_sections(layer, path)
            config = merge(config, _with_long_names(layer))
        flags = _long_named(flags)
        beside_checkpoint = config if found_in is not None else None
        config = dict(config)
        written = config.pop("run_dir", None)  # of a run that was put aside, where it was
        run_dir = options["run_dir"][-1] if options["run_dir"] else found_in or written
        config, flags = with_nulls(config, flags)
        if which is None:
            which = config.pop("ckpt_path", None)
        config.pop("ckpt_path", None)
        run_dir = Path(run_dir) if run_dir else Path("runs") / ("-".join(p.stem for p in paths) or "unnamed")
        usage.check_options(command, flags, config if found_in is None else {})
        usage.check_complete(command, which, flags, config)
        usage.check_run_dir(run_dir)
        if not usage.asks(flags):
            usage.check_output(command, output, overwrite)
            usage.check_checkpoint(command, which, run_dir)
            usage.check_data_files(command, flags, config)
            if announce is not None:
                read = " + ".join(map(str, paths)) or (which if which not in (None, *usage.NAMES) else "")
                written_to = output if command == "predict" else run_dir
                announce(" ".join(filter(None, (command, read, f"-> {written_to}" if written_to else ""))))

        from apps.cli.checkpoint import find_checkpoint, import_named, remembered
        from apps.train.loading import check_beside, load_checkpoint

        if beside_checkpoint is not None:
            check_beside(beside_checkpoint, paths[0])
            print(f"configuration: {paths[0]}, which lies beside the checkpoint", file=sys.stderr)
        try:
            checkpoint = None if usage.asks_for_help(flags) else find_checkpoint(command, which, run_dir)
        except FileNotFoundError:
            if which is not None or not usage.asks(flags):
                raise
            checkpoint = None  # a configuration can be printed without one
        if checkpoint is not None:
            loaded = load_checkpoint(checkpoint)
            if found_in is None:
                import_named(loaded, {*_texts(config), *(part for flag in flags for part in flag.split("=", 1))})
            model_class = _find_class("model", flags, config)
            config = merge(remembered(loaded, config, model_class, checkpoint), config)
            config = with_remembered_data(config, flags, loaded)
            check_superseded(config, flags, checkpoint)
        for part in ("model", "data"):
            config = with_defaults(part, flags, config)
        config, rest = with_own_defaults(config, flags)
        flags = rest if not usage.asks_for_help(flags) else flags
        model_class = _find_class("model", flags, config)
        return cls(command, tuple(flags), config, run_dir, checkpoint, model_class, output, overwrite)

    @contextlib.contextmanager
    def config_file(self) -> Iterator[str | None]:
        """The merged configuration as a file, while the parser reads it."""
        if not self.config:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
            path = Path(folder) / "config.yaml"
            with naming(path):
                path.write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
            yield str(path)


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
        elif short(old.get("class_path")) != short(value.get("class_path", old.get("class_path"))):
            merged[key] = dict(value)
        else:
            merged[key] = merge(old, value)
    return merged


def shipped(path: Path) -> Path:
    """``path``; where it names a configuration of ours and the working folder has none, the one that came along."""
    own = CONFIGS.parent / path
    return path if path.exists() or path.parts[:1] != (CONFIGS.name,) or not own.is_file() else own


def _with_long_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the class paths of the apps' model and data in place of short names."""
    out = dict(config)
    for part in ("model", "data"):
        written = config.get(part)
        if isinstance(written, str):
            out[part] = long_name(part, written)
        elif isinstance(written, Mapping) and isinstance(written.get("class_path"), str):
            out[part] = {**written, "class_path": long_name(part, written["class_path"])}
    return out


def _long_named(flags: list[str]) -> list[str]:
    """Return ``flags`` with the class paths of the apps' model and data in place of short names."""
    out: list[str] = []
    for i, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        option = re.compile(r"--(model|data)(\.class_path|\.help)?")
        if (match := option.fullmatch(key)) and equals:
            flag = f"{key}={long_name(match[1], value)}"
        elif i and (match := option.fullmatch(flags[i - 1])):
            flag = long_name(match[1], flag)
        out.append(flag)
    return out


_MOST_BYTES, _MOST_VALUES = 16 << 20, 1_000_000
"""Limits of a configuration: its size, and its values with aliases written out."""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is not a configuration: it has {path.stat().st_size:,} bytes of {_MOST_BYTES:,}")
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
        if node is not None and _num_values(node, {}, path) > _MOST_VALUES:
            raise UsageError(f"{path}: its aliases stand for over {_MOST_VALUES:,} values")
        config = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder, not a configuration") from error
    except FileNotFoundError as error:
        raise UsageError(f"no configuration {path}{nearest(path)}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a configuration: it holds a {type(config).__name__}, not keys with values")
    return config


def _num_values(node: yaml.Node, known: dict[int, int], path: Path) -> int:
    """Return how many values a node stands for with each alias written out. A file of 1 KB can stand for 10^9."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1  # open
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_num_values(part, known, path) for part in inner)
    if known[id(node)] < 0:
        raise UsageError(f"{path}: an alias stands for a value that holds the alias")
    return known[id(node)]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of nested plain values."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def nearest(path: Path) -> str:
    """Return what to say after the path of a configuration that is not there: the nearest one."""
    folder = path.parent
    if not folder.is_dir() and path.parts[:1] == (CONFIGS.name,):
        folder = CONFIGS.parent / folder
    if not folder.is_dir():
        return f": there is no folder {path.parent}"
    near = difflib.get_close_matches(path.stem, [p.stem for p in folder.glob("*.yaml")], n=1)
    return f"; did you mean {path.parent / near[0]}.yaml?" if near else ""


def switch(argv: list[str], name: str) -> tuple[list[str], bool]:
    """Return ``argv`` without the switch called ``name``, and whether it is on; a value may follow, true or false."""
    rest: list[str] = []
    on = False
    items = iter(enumerate(argv))
    for i, item in items:
        key, equals, value = item.partition("=")
        if key != f"--{name}":
            rest.append(item)
            continue
        if not equals:
            value = "true"
            if argv[i + 1 : i + 2] in (["true"], ["false"]):
                value = next(items)[1]
        if value not in ("true", "false"):
            raise UsageError(f"{name}={value} is not one of true, false")
        on = value == "true"
    return rest, on


def take(argv: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
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


def verbatim(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """``flags`` with the values of the options called ``names`` as lists of one text: what a user wrote is not YAML.

    A list of texts in quotes stays as it is.

    Example::

        verbatim(["--data.text", "- Yes: no"], ("data.text",))     # ['--data.text=["- Yes: no"]']
    """
    out: list[str] = []
    items = iter(flags)
    for item in items:
        key, equals, value = item.partition("=")
        if not (key.startswith("--") and key[2:] in names):
            out.append(item)
            continue
        if not equals:
            value = next(items, "")
            if not value:
                raise UsageError(f"{key} needs a value")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"the text of {key} is not valid UTF-8")
        if _QUOTED_LIST.fullmatch(value):
            out.append(f"{key}={value}")
            continue
        text = json.dumps([value], ensure_ascii=False)
        out.append(f"{key}=" + _ESCAPED_IN_YAML.sub(lambda c: f"\\u{ord(c[0]):04x}", text))
    return out


def with_nulls(config: Mapping[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """``config`` with what the flags set to null two levels and more below "model" or "data", and the other flags.

    (jsonargparse passes such a null on as the text "None".)

    One that is set by another flag too has that one's value.

    Example::

        with_nulls({"model": {"moe": {"top": 1}}}, ["--model.moe.top", "null"])
        # {"model": {"moe": {"top": None}}}, []
    """

    def null(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        return len(names) > 2 and value in _NULLS and isinstance(_at(merged, names[:-1]), Mapping)

    return _with_flags(config, flags, null, lambda value: None)


def _with_flags(
    config: Mapping[str, Any],
    flags: list[str],
    takes: Callable[[Mapping[str, Any], list[str], str], bool],
    plain: Callable[[str], Any],
) -> tuple[dict[str, Any], list[str]]:
    """Lay some flags over ``config``.

    Args:
        config: nested mappings.
        flags: ``--KEY.SUBKEY VALUE`` and ``--KEY.SUBKEY=VALUE``.
        takes: whether to take a flag, by the mappings so far, the names of its key and its value.
        plain: makes of its text what stands there.

    Returns:
        The mappings, and the other flags.
    """
    merged, out = dict(config), list[str]()
    items = iter(flags)
    for item in items:
        key, equals, value = item.partition("=")
        given = [item, *([] if equals else itertools.islice(items, 1))] if key.startswith("--") else [item]
        value = value if equals else given[-1]
        names = [name for name in key.removeprefix("--").split(".") if name not in ("init_args", "class_path")]
        if not takes(merged, names, value):
            out += given
            continue
        over = plain(value)
        for name in reversed(names):
            over = {name: over}
        merged = merge(merged, over)
    return merged, out


def with_remembered_data(config: Mapping[str, Any], flags: list[str], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the arguments of the data that the data's class names in ``from_checkpoint``.

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
    path = _class_path("data", flags, config)
    arguments = {k: v for k, v in arguments.items() if k != "class_path"}
    return {**config, "data": {"class_path": path, "init_args": {**arguments, **filled}}}


def with_defaults(part: str, flags: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with what is in force where an argument of the model or data is null or not given.

    See ``SparseModule.defaults_of_none``. A null that stands for nothing, such as "no MoE layer", stays.
    """
    kind, path = _find_class(part, flags, config), _class_path(part, flags, config)
    stand_ins = getattr(kind, "defaults_of_none", None)
    written = config.get(part)
    written = {"class_path": written} if isinstance(written, str) else dict(written or {})
    if stand_ins is None or written.get("class_path", path) != path:
        return dict(config)

    from core.config.plain import to_plain

    arguments = written.get("init_args") or {} if {"class_path", "init_args"} & written.keys() else written
    options = ((name.removeprefix(f"{part}."), value) for name, value in usage.given(flags))
    by_flag = {name: None if value in _NULLS else value for name, value in options}
    filled = {
        name: to_plain(value, type(value))
        for name, value in stand_ins({**arguments, **by_flag}).items()
        # A flag that names a class, or the whole, begins from nothing: it would keep the stand-in's arguments.
        if arguments.get(name) is None and not {name, f"{name}.class_path"} & by_flag.keys()
    }
    others = {"dict_kwargs": written["dict_kwargs"]} if "dict_kwargs" in written else {}
    return {**config, part: {"class_path": path, "init_args": {**arguments, **filled}, **others}}


def with_own_defaults(config: Mapping[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``config`` with every option of the config classes that it or the flags name, and the other flags.

    (Where another class than a default's is named, jsonargparse keeps the default's values of options with the same
    name: ``core.SwiGLU`` in place of a default ``FFN(activation="gelu")`` would compute GELU.)

    Example::

        with_own_defaults({"model": {"expert": {"class_path": "core.SwiGLU"}}}, [])
        # {"model": {"expert": {"class_path": "core.SwiGLU", "init_args": {"activation": "silu", ...}}}}, []
    """

    def names_class(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        model = merged.get("model")
        inside = names[0] == "model" and len(names) > 1 and isinstance(model, Mapping) and "class_path" in model
        return inside and _config_class(value) is not None

    merged, rest = _with_flags(config, flags, names_class, lambda value: {"class_path": value})
    return {k: _with_own_defaults(v) if k == "model" else v for k, v in merged.items()}, rest


def _with_own_defaults(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_own_defaults(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    inner = {k: _with_own_defaults(v) for k, v in value.items()}
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
    module = name.rpartition(".")[0]
    if module and module.partition(".")[0] not in ("core", "apps"):
        with contextlib.suppress(ImportError):  # the parser reports a class that does not exist
            importlib.import_module(module)
    try:
        return core.registered_config(name)
    except ValueError:
        return None


def check_superseded(config: Mapping[str, Any], flags: list[str], checkpoint: Path) -> None:
    """Refuse flags that have no effect beside what the checkpoint remembers: ``superseded`` of the data's class.

    Those that its run was given too may stay.

    Raises:
        UsageError: naming the flag.
    """
    kind = _find_class("data", flags, config)
    for name, by in getattr(kind, "superseded", {}).items():
        if _at(config, ("data", "init_args", by)) is None:
            continue
        beside = checkpoint.parent.parent / "config.yaml"
        of_run = _at(_read_yaml(beside), ("data", "init_args")) if beside.is_file() else None
        option = re.compile(rf"--data\.(?:init_args\.)?({name}(?:\.\w+)*)(?:=(.*))?", re.DOTALL)
        for flag, following in itertools.pairwise([*flags, ""]):
            if not (match := option.fullmatch(flag)):
                continue
            value, known = yaml.safe_load(match[2] or following), _at(of_run, match[1].split("."))
            both = isinstance(value, Mapping) and isinstance(known, Mapping)
            if known != (merge(known, value) if both else value):
                told = f"data.{match[1]}={value} has no effect: {checkpoint} brings its {by} along"
                raise UsageError(f"{told}; leave it out")


def _at(values: Any, keys: Iterable[str]) -> Any:
    """What stands there in nested mappings, of a class among its arguments; None: nothing."""
    for key in keys:
        if isinstance(values, Mapping) and "class_path" in values and key != "init_args":
            values = values.get("init_args")
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _class_path(part: str, flags: list[str], config: Mapping[str, Any]) -> str | None:
    """What the flags, else the configuration, name as the class of "model" or "data"."""
    return usage.class_path(part, usage.given(flags), config)


def _find_class(part: str, flags: list[str], config: Mapping[str, Any]) -> type | None:
    """The class of "model" or "data"; None where none is named, or there is no such class."""
    path = _class_path(part, flags, config)
    if not path:
        return None
    module, _, name = path.rpartition(".")
    if not module:
        from lightning.pytorch import LightningDataModule, LightningModule

        base = LightningDataModule if part == "data" else LightningModule
        return next((k for k in subclasses(base) if k.__name__ == path), None)
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None  # the parser reports a class that does not exist
        raise
