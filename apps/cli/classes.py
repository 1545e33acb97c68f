"""Classes by name, read from their source: a usage error is known before torch, which takes seconds, is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

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
    """Return the class path of the app's model or data module with this short name; any other name as it is."""
    return app_classes(part).get(name, name)


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
        files = [Path(folder, *inner[:-1], name) for folder in folders for name in (f"{inner[-1]}.py",)]
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


def parameters(class_path: str) -> list[str] | None:
    """Return the names of a class's options; None where its source does not tell, as with ``**kwargs``."""
    module, _, name = class_path.rpartition(".")
    tree = source(module) if module else None
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name] if tree else []
    methods = [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)]
    for method in methods:
        if method.name == "__init__" and method.args.kwarg is None and method.args.vararg is None:
            given = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
            return [argument.arg for argument in given[1:]]
    return None
