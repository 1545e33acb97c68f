"""Configuration files: finding and reading one, and laying one over another."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from apps.base.files import CONFIGS
from apps.cli.errors import UsageError
from apps.registry import of_today, short, without_dropped

_MOST_BYTES, _MOST_VALUES = 16 << 20, 1_000_000
"""Limits of a configuration: its size, and its values with aliases written out."""


def shipped(path: Path) -> Path:
    """Return ``path``; if it names a configuration of ours that the working folder lacks, the one of the package."""
    own = CONFIGS.parent / path
    return path if path.exists() or path.parts[:1] != (CONFIGS.name,) or not own.is_file() else own


def _nearest(path: Path) -> str:
    """Return what to say after the path of a configuration that is not there: the nearest one."""
    folder = path.parent
    if not folder.is_dir() and path.parts[:1] == (CONFIGS.name,):
        folder = CONFIGS.parent / folder
    if not folder.is_dir():
        return f": there is no folder {path.parent}"
    near = difflib.get_close_matches(path.stem, [p.stem for p in folder.glob("*.yaml")], n=1)
    return f"; did you mean {path.parent / near[0]}.yaml?" if near else ""


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a configuration, with the names of today and without options that no model has now.

    Raises:
        UsageError: the file does not exist, or is not a configuration.
    """
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
        raise UsageError(f"no configuration {path}{_nearest(path)}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a configuration: it holds a {type(config).__name__}, not keys with values")
    model = config.get("model")
    if isinstance(model, dict) and isinstance(model.get("init_args"), dict):
        config["model"] = {**model, "init_args": without_dropped(str(model.get("class_path")), model["init_args"])}
    return {**of_today(config)}


def _num_values(node: yaml.Node, known: dict[int, int], path: Path) -> int:
    """Return the number of values of a node with each alias written out. A file of 1 KB can expand to 10^9."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1  # open
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_num_values(part, known, path) for part in inner)
    if known[id(node)] < 0:
        raise UsageError(f"{path}: an alias stands for a value that holds the alias")
    return known[id(node)]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``over`` laid over ``base``, mapping by mapping. If it names another class, the old arguments go.

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


def at(values: Any, keys: Iterable[str]) -> Any:
    """Return the value at ``keys`` in nested mappings, of a class among its arguments; None: nothing."""
    for key in keys:
        if isinstance(values, Mapping) and "class_path" in values and key != "init_args":
            values = values.get("init_args")
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def dotted(values: Mapping[str, Any], start: str = "") -> Iterator[str]:
    """Yield the dotted name of every value in nested mappings, a class's arguments without ``init_args``."""
    for key, value in values.items():
        if key == "init_args" and isinstance(value, Mapping):
            yield from dotted(value, start)
        elif key != "class_path":
            yield f"{start}{key}"
            yield from dotted(value, f"{start}{key}.") if isinstance(value, Mapping) else ()


def texts(value: Any, keys: Collection[str], key: str = "") -> Iterator[str]:
    """Yield every text at one of ``keys`` in nested plain values."""
    if isinstance(value, str) and key in keys:
        yield value
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        yield from texts(inner, keys, str(name))
    for inner in value if isinstance(value, list) else ():
        yield from texts(inner, keys, key)


_NAMES_CLASS = re.compile(r"--(data|data\.class_path|(model|sparsify|trainer|optimizer|lr_scheduler)\b.*)")


def own_classes(words: Iterable[str]) -> list[str]:
    """Return the class paths outside the suite that a command line and its configurations name.

    If the working folder has such a module, and it is found nowhere else, the folder comes last on ``sys.path``. So
    modules that a checkpoint names, or a library tries to import, are not looked for there.
    """
    named: list[str] = []
    parts = [part for word in words for part in word.split("=", 1)]
    for flag, word in zip(["", *parts], parts, strict=False):
        if _NAMES_CLASS.fullmatch(flag):
            named.append(word)
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            named += texts(read_config(Path(word)), ("class_path", "model", "data"))
    paths = [path for text in named for path in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", text)]
    paths = [path for path in paths if not path.startswith(("core.", "apps."))]
    for top in {path.partition(".")[0] for path in paths} - sys.modules.keys():
        lies_here = Path(f"{top}.py").is_file() or Path(top, "__init__.py").is_file()
        if lies_here and importlib.util.find_spec(top) is None:
            sys.path.append(str(Path.cwd()))
    return paths
