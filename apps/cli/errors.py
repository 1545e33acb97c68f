"""Exceptions to one line each. jsonargparse reports a typo in fifteen lines that end in "Expected a NoneType"."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from apps.cli import UsageError
from apps.messages import message, one_line

_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but |Problem with given class_path .*instantiat)"
)
_KEY = re.compile(r'^Parser key "([^"]+)":\s*(.*)$')
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':\s*(.*)$")
_OPTION = re.compile(r"^Option '([^']+)' is not accepted")
_NO_OPTION = re.compile(r"^Subcommand '\w+' does not accept option '([^']+)'")
_NAME = re.compile(r"^Expected a dot import path string: (.+)$")
_KIND = re.compile(
    r"\s*(?:<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?Literal(\[[^\[\]]*\])|((?:[^\[\],]|\[(?:[^\[\]]|\[[^\]]*\])*\])+))"
)


def describe(error: BaseException) -> tuple[str, int]:
    """One line for people, and the exit code: 2 for wrong usage, 1 for anything else."""
    if type(error).__name__ == "ArgumentError":
        return reduce_message(str(error)), 2
    if isinstance(error, UsageError):
        return one_line(str(error)), 2
    root = _root(error)
    if type(root).__name__ == "OutOfMemoryError" or isinstance(root, MemoryError):
        return "out of memory: try a smaller data.batch_size, or trainer.precision=bf16-mixed", 1
    if isinstance(root, OSError):
        return _os_error(root), 1
    if isinstance(root, (ValueError, RuntimeError)) or type(root).__name__ == "MisconfigurationException":
        return one_line(message(root)) or type(root).__name__, 1
    return f"{type(root).__name__}: {one_line(message(root))} (--traceback shows where)", 1


def _root(error: BaseException) -> BaseException:
    """What jsonargparse wrapped: the first cause of its "Does not validate against any of the Union subtypes"."""
    while error.__cause__ is not None and str(error).startswith(("Does not validate", "Problem with given")):
        error = error.__cause__
    return error


def _os_error(error: OSError) -> str:
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error.strerror or message(error)) or type(error).__name__


def reduce_message(text: str, options: Iterable[str] = ()) -> str:
    """jsonargparse's report as one line: the innermost complaint, where it is, and the nearest valid name.

    Args:
        text: the report.
        options: the valid dotted options, to suggest from.
    """
    path: list[str] = []
    owner: str | None = None
    complaint = kinds = ""
    for raw in text.splitlines():
        line = raw.strip().removeprefix("- ").strip()
        while line:
            if match := _KEY.match(line):
                path.append(match[1])
                line, kinds = match[2].strip(), ""
            elif match := _CLASS.match(line):
                owner = match[1]
                line, kinds = match[2].strip(), ""
            elif _NOISE.match(line):
                if line.startswith("Subtypes: "):
                    kinds = line.removeprefix("Subtypes: [").removesuffix("]")
                line = ""
            else:
                complaint = line
                break
        if complaint:
            break
    key = ".".join(path)
    if not complaint:
        value = re.search(r"Given value: (.*)", text)
        return f"{key}={value[1]} is not valid" if value else one_line(text)
    if match := _OPTION.match(complaint):
        return _unknown(f"{key}.{match[1]}" if key else match[1], match[1], _parameters(owner), owner)
    if match := _NO_OPTION.match(complaint):
        return _unknown(match[1], match[1], options, None)
    if match := re.match(r"^unrecognized arguments: (.*)$", complaint):
        first = match[1].split()[0].split("=")[0]
        if not first.startswith("-"):
            return f"unexpected argument {first!r}: options are written --key value"
        first = first.lstrip("-")
        return _unknown(first, first, options, None)
    if match := re.match(r"^the following arguments are required: (.*)$", complaint):
        missing = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        if not {"model", "data"}.issuperset(missing.split(", ")):
            return f"{key or owner or 'the configuration'} needs {missing}, which has no default"
        return f"{missing} missing: give a configuration, such as --config configs/vision/digits.yaml"
    if match := _NAME.match(complaint):
        return _unknown(f"{key}={match[1]}", match[1], _class_names(owner, path[-1] if path else ""), None)
    wanted = re.match(r"^Expected an? (<class '[\w.]+'>|(?:typing\.)?Literal\[[^\]]*\])", complaint)
    value = re.search(r"(?:Got value|Given value): (.*)", text[text.index(complaint) :])
    if wanted and value:
        return f"{key}={value[1].strip()} is not {_one_of(kinds or wanted[1])}"
    if key == "config":
        return one_line(complaint)
    return one_line(f"{key}: {complaint}" if key else complaint)


def _one_of(kinds: str) -> str:
    """What jsonargparse lists as the types of an option, in words: "of type int", or "one of" types and choices."""
    names: list[str] = []
    for name, choices, other in _KIND.findall(kinds):
        found = map(str, ast.literal_eval(choices)) if choices else [name or other.removeprefix("typing.")]
        names += [n for n in found if n and n != "NoneType" and n not in names]
    if len(names) == 1 and "Literal" not in kinds:
        return f"of type {names[0]}"
    return f"one of {', '.join(names)}"


def _unknown(shown: str, name: str, valid: Iterable[str], owner: str | None) -> str:
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"{shown} does not exist; did you mean {near[0]!r}?"
    if owner and valid:
        return f"{shown} does not exist; {owner.rpartition('.')[2]} has {', '.join(valid)}"
    return f"{shown} does not exist" + (f"; there is {', '.join(valid)}" if 0 < len(valid) <= 12 else "")


def _import(class_path: str | None) -> Any:
    module, _, name = (class_path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _parameters(class_path: str | None) -> list[str]:
    kind = _import(class_path)
    if kind is None:
        return []
    return [p for p in inspect.signature(kind).parameters if p not in ("self", "args", "kwargs")]


def _class_names(owner: str | None, parameter: str) -> list[str]:
    """Names of the classes that a parameter of ``owner`` may be; without owner, the models or the data modules."""
    if owner is None:
        from lightning.pytorch import LightningDataModule, LightningModule

        base = LightningDataModule if parameter == "data" else LightningModule
        return [k.__name__ for k in subclasses(base) if k.__module__.startswith("apps.")]
    kind = _import(owner)
    try:
        hint = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__).get(parameter)
    except (NameError, TypeError, AttributeError):
        return []
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [k.__name__ for h in hints if isinstance(h, type) for k in subclasses(h) if dataclasses.is_dataclass(k)]


def subclasses(kind: type[Any]) -> list[type[Any]]:
    """``kind`` and the classes below it that have been imported."""
    found = [kind]
    for sub in kind.__subclasses__():
        found += subclasses(sub)
    return found
