"""Wrong options and values that the source of a class shows: found before the class and its libraries are imported.

What is unclear here, such as a type of another library, is left to ``apps.cli.sections``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from apps.cli.classes import named_class_path
from apps.cli.errors import UsageError, unknown_option
from apps.cli.values import MissingError, make, read

_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_PLAIN = {kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple, set)}


class _Unclear(Exception):
    """The source does not say it."""


def check_early(config: Mapping[str, Any], with_core: bool = False) -> None:
    """Check the options of trainer, model and data, and their values of simple types.

    Args:
        config: plain sections, with class paths.
        with_core: check the values of ``core``'s configs instead, and make these; it imports torch.

    Raises:
        UsageError: an option does not exist, or its value has a wrong type.
        ValueError: a config of ``core`` rejects a value.
    """
    for part in ("trainer", "model", "data"):
        section, path = config.get(part), _TRAINER if part == "trainer" else named_class_path(part, config)
        if not isinstance(section, Mapping) or not path or "dict_kwargs" in section:
            continue
        given = (section.get("init_args") or {}) if "class_path" in section else section
        try:
            known = _parameters(path)
        except _Unclear:
            continue
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if name not in known:
                raise UsageError(unknown_option(f"{part}.{name}", known, str(name), path))
            hint, imports = known[name]
            try:
                kind = _evaluated(hint, imports, with_core)
                if not with_core:
                    read(value, kind, f"{part}.{name}")
                elif "core" in ast.dump(hint):
                    make(read(value, kind, f"{part}.{name}"))
            except (_Unclear, MissingError):  # a checkpoint or a default may bring what is missing
                pass


@dataclass(frozen=True)
class _Source:
    """A module's classes, and the dotted names of what it imports, by the names that they have in it."""

    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, str]

    @staticmethod
    @cache
    def of(module: str) -> _Source:
        """Read the file of a module, without importing anything."""
        tail = Path(*module.split("."))
        files = (Path(place, own) for place in sys.path for own in (tail.with_suffix(".py"), tail / "__init__.py"))
        try:
            tree = ast.parse(next(file for file in files if file.is_file()).read_bytes())
        except (StopIteration, SyntaxError, ValueError, OSError):
            raise _Unclear from None
        imports: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imports |= {alias.asname or alias.name: alias.name for alias in node.names}
        return _Source({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}, imports)


def _parameters(path: str) -> dict[str, tuple[ast.expr, Mapping[str, str]]]:
    """Return the annotation of each argument of a class and of those that its ``**kwargs`` go to, by name, and the
    names that its module imports."""
    module, _, name = path.rpartition(".")
    source = _Source.of(module)
    kind = source.classes.get(name)
    if kind is None:
        if name not in source.imports:
            raise _Unclear
        return _parameters(source.imports[name])
    found = next((n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    out: dict[str, tuple[ast.expr, Mapping[str, str]]] = {}
    if found is not None:
        names = [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs][1:]
        out = {own.arg: (own.annotation or ast.Constant(...), source.imports) for own in names}
        if found.args.vararg or found.args.kwarg is None:
            return out
    for base in _bases(kind):
        out = {**_parameters(f"{module}.{base}" if base in source.classes else source.imports.get(base, base)), **out}
        if found is None:
            return out
    if not kind.bases:
        raise _Unclear
    return out


def _bases(kind: ast.ClassDef) -> Iterator[str]:
    for base in kind.bases:
        if not isinstance(base, ast.Name):
            raise _Unclear
        yield base.id


def _evaluated(node: ast.expr, imports: Mapping[str, str], with_core: bool) -> Any:
    """Return a type hint of builtin types and of the standard library, and of ``core`` if asked."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in _PLAIN and name not in imports:
            return _PLAIN[name]
        case ast.Name(id=name) if name in imports:
            return _imported(imports[name], with_core)
        case ast.Attribute(value=owner, attr=name):
            return getattr(_evaluated(owner, imports, with_core), name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _evaluated(left, imports, with_core) | _evaluated(right, imports, with_core)
        case ast.Subscript(value=owner, slice=inner):
            kind = _evaluated(owner, imports, with_core)
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if kind is Literal and all(isinstance(part, ast.Constant) for part in parts):
                return Literal[tuple(part.value for part in parts if isinstance(part, ast.Constant))]
            kinds = tuple(_evaluated(part, imports, with_core) for part in parts)
            return kind[kinds if isinstance(inner, ast.Tuple) else kinds[0]]
    raise _Unclear


def _imported(dotted: str, with_core: bool) -> Any:
    module, _, name = dotted.rpartition(".")
    if module in ("typing", "collections.abc", "pathlib"):
        return getattr(importlib.import_module(module), name)
    if with_core and dotted.partition(".")[0] == "core":
        return importlib.import_module(dotted) if not module else getattr(importlib.import_module(module), name)
    raise _Unclear
