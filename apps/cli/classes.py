"""Classes by name: the short names of public ones, the options that a source tells, and the imported class.

A usage error is known from the source, before torch, which takes seconds, is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps import registry


def short(class_path: str | None) -> str | None:
    """Return the name of the class, as a configuration may write it."""
    return class_path and class_path.rpartition(".")[2]


def app_classes(part: str) -> dict[str, str]:
    """Return the class paths of the apps' models or data modules, by short name.

    Args:
        part: "model" or "data".
    """
    homes = registry.DATA if part == "data" else registry.MODULES
    return {name: f"{module}.{name}" for name, module in sorted(homes.items())}


def long_name(part: str, name: str) -> str:
    """Return the class path of a short name: an app's model or data module, or torch's optimizer or scheduler.

    torchrec has optimizers of the same names. Any other name is returned as it is.
    """
    if part in ("model", "data"):
        path = registry.full_path(name) or name
        return path if path in app_classes(part).values() else name
    if name == "ReduceLROnPlateau":  # Lightning's names the metric that it monitors
        return f"lightning.pytorch.cli.{name}"
    home = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}[part]
    return f"{home}.{name}" if name.isidentifier() and name not in ("null", "none", "None") else name


def with_long_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the class paths of public classes in place of their short names."""
    out = dict(config)
    for part in ("model", "data", "optimizer", "lr_scheduler"):
        written = config.get(part)
        if isinstance(written, str):
            out[part] = long_name(part, written)
        elif isinstance(written, Mapping) and isinstance(written.get("class_path"), str):
            out[part] = {**written, "class_path": long_name(part, written["class_path"])}
    if isinstance(config.get("trainer"), Mapping):
        out["trainer"] = _with_long_parts(config["trainer"])
    return out


def with_short_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the short names of public classes; ``with_long_names`` is the inverse."""
    out = dict(config)
    for part in ("model", "data"):
        if isinstance(written := config.get(part), Mapping) and "class_path" in written:
            out[part] = {**written, "class_path": registry.name_of(written["class_path"])}
    if "trainer" in config:
        out["trainer"] = registry.renamed(config["trainer"], registry.name_of)
    return out


def _with_long_parts(value: Any) -> Any:
    """Return options of the trainer where each public class is named by its class path."""
    if isinstance(value, str) and value in registry.TRAINER:
        return {"class_path": registry.full_path(value)}
    if isinstance(value, list):
        return [_with_long_parts(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    path = value.get("class_path")
    long = {"class_path": registry.full_path(path)} if isinstance(path, str) and path in registry.TRAINER else {}
    return {**{key: _with_long_parts(item) for key, item in value.items() if key != "class_path" or not long}, **long}


_NAMES_CLASS = re.compile(
    r"--(model|data|trainer|optimizer|lr_scheduler)(\.class_path|\.help|\.\w+\+?|\.\w+\.class_path)?"
)


def with_long_flags(flags: Sequence[str]) -> list[str]:
    """Return the words of a command line with the class paths of public classes in place of their short names."""
    out: list[str] = []
    for flag in flags:
        key, equals, value = flag.partition("=")
        if equals and (match := _NAMES_CLASS.fullmatch(key)):
            flag = f"{key}={_long_value(match, value)}"
        elif out and (match := _NAMES_CLASS.fullmatch(out[-1])):
            flag = _long_value(match, flag)
        out.append(flag)
    return out


def _long_value(match: re.Match[str], value: str) -> str:
    part, rest = match[1], match[2]
    if part != "trainer":
        return long_name(part, value) if rest in (None, ".class_path", ".help") else value
    if value not in registry.TRAINER:
        return value
    path = str(registry.full_path(value))
    # A strategy may be a text as well: only a mapping is taken for a class.
    return path if (rest or "").endswith(".class_path") else json.dumps({"class_path": path})


def load_class(path: str | None) -> Any:
    """Import and return the class of a class path; None where there is no such module or no such name in it.

    Raises:
        ImportError: the module is there, and what it imports is not.
    """
    module, _, name = (path or "").rpartition(".")
    if not module:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


@functools.cache
def source(module: str) -> ast.Module | None:
    """Return the parsed source of a module that is not imported for it, or None where there is no such file."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    if not inner:
        files = [Path(spec.origin)] if spec.origin else []
    else:
        files = [Path(folder, *inner[:-1], f"{inner[-1]}.py") for folder in folders]
        files += [Path(folder, *inner, "__init__.py") for folder in folders]
    for file in files:
        if file.suffix == ".py" and file.is_file():
            try:
                return ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                return None
    return None


def defined(module: str) -> list[str] | None:
    """Return the names that a module defines or imports at its top; None where the source does not tell."""
    tree = source(module)
    if tree is None:
        return None
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
        elif not isinstance(node, ast.Expr):
            return None  # names may be defined under an if
    return None if "*" in names or "__getattr__" in names else names


def parameters(path: str) -> list[str] | None:
    """Return the names of a class's options; None where its source does not tell, as with ``**kwargs``."""
    module, _, name = path.rpartition(".")
    tree = source(module) if module else None
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name] if tree else []
    methods = [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)]
    for method in methods:
        if method.name == "__init__" and method.args.kwarg is None and method.args.vararg is None:
            given = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
            return [argument.arg for argument in given[1:]]
    return None


def constructor_parameters(kind: type[Any]) -> Iterator[tuple[type[Any], inspect.Parameter]]:
    """Yield the constructor's parameters, each with the class that has it.

    ``**kwargs`` stands for the parameters of the next class.
    """
    seen: set[str] = set()
    for owner in kind.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in seen:
                continue
            seen.add(parameter.name)
            yield owner, parameter
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
