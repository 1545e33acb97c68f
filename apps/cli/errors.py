"""Exceptions to one line each. jsonargparse reports a typo in fifteen lines that end in "Expected a NoneType"."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable
from typing import Any

from apps import registry
from apps.base.messages import message, one_line
from apps.cli.classes import app_classes, constructor_parameters, load_class

_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but |Problem with given class_path .*instantiat)"
)
_KEY = re.compile(r'^Parser key "([^"]+)":\s*(.*)$')
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':\s*(.*)$")
_OPTION = re.compile(r"^Option '([^']+)' is not accepted")
_NO_OPTION = re.compile(r"^Subcommand '\w+' does not accept option '([^']+)'")
_NAME = re.compile(r"Expected a dot import path string: (.+)$", re.MULTILINE)
_NO_CLASS = re.compile(r"^module '([\w.]+)' has no attribute '\w+'$")
_NO_MODULE = re.compile(r"^No module named '")
_BASE = re.compile(r"<class '([\w.]+)'>|\[([\w.]+)\]")
_KIND = re.compile(
    r"\s*(?:<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?Literal(\[[^\[\]]*\])|((?:[^\[\],]|\[(?:[^\[\]]|\[[^\]]*\])*\])+))"
)


class UsageError(ValueError):
    """The command line or a configuration is wrong."""


def stopped(stop: BaseException, advice: str) -> int:
    """Return the exit code of a command that a signal or an exit has ended; a signal is named, with ``advice``."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        how, code = "interrupted", 130  # Lightning turns an interrupt into exit(1)
    elif type(stop).__name__ == "SIGTERMException":  # Lightning's; pre-emption and ``timeout`` send SIGTERM
        how, code = "terminated", 143
    else:
        code = getattr(stop, "code", 1)
        return code if isinstance(code, int) else 0 if code is None else 1
    print(f"\n{how}{advice}", file=sys.stderr)
    return code


def failed(error: Exception, show_traceback: bool) -> int:
    """Print what went wrong as one line, and return the exit code."""
    if show_traceback:
        traceback.print_exception(error)
    line, code = describe(error)
    print(f"error: {line}", file=sys.stderr)
    return code


def describe(error: BaseException) -> tuple[str, int]:
    """Return one line for people, and the exit code: 2 for wrong usage, 1 for anything else."""
    if type(error).__name__ == "ArgumentError":
        return reduce_message(str(error)), 2
    if isinstance(error, UsageError):
        return one_line(str(error)), 2
    root = _root(error)
    if isinstance(root, ModuleNotFoundError) and root.name in ("torchrec", "fbgemm_gpu"):
        return f"embedding tables need {root.name}, which is not installed: it is for Linux on x86-64", 1
    if type(root).__name__ == "OutOfMemoryError" or isinstance(root, MemoryError):
        return "out of memory: try a smaller data.batch_size, or trainer.precision=bf16-mixed", 1
    if isinstance(root, OSError):
        return _os_error(root), 1
    if isinstance(root, (ValueError, RuntimeError)) or type(root).__name__ == "MisconfigurationException":
        return one_line(message(root)) or type(root).__name__, 1
    return f"{type(root).__name__}: {one_line(message(root))} (--traceback shows where)", 1


def _root(error: BaseException) -> BaseException:
    """Return the error that jsonargparse wrapped in its "Does not validate against any of the Union subtypes"."""
    while error.__cause__ is not None and str(error).startswith(("Does not validate", "Problem with given")):
        error = error.__cause__
    return error


def _os_error(error: OSError) -> str:
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error.strerror or message(error)) or type(error).__name__


def reduce_message(text: str, options: Iterable[str] = ()) -> str:
    """Return jsonargparse's report as one line: the innermost complaint, its place, and the nearest valid name.

    Args:
        text: the report.
        options: the valid dotted options, to suggest from.
    """
    path: list[str] = []
    owner: str | None = None
    outer: str | None = None
    complaint = kinds = ""
    for raw in text.splitlines():
        line = raw.strip().removeprefix("- ").strip()
        while line:
            if match := _KEY.match(line):
                path.append(match[1])
                line, kinds = match[2].strip(), ""
            elif match := _CLASS.match(line):
                outer, owner = owner, match[1]
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
        return unknown_option(f"{key}.{match[1]}" if key else match[1], _parameters(owner), match[1], owner)
    if match := _NO_OPTION.match(complaint):
        return unknown_option(match[1], options)
    if match := re.match(r"^unrecognized arguments: (.*)$", complaint):
        first = match[1].split()[0].split("=")[0]
        if not first.startswith("-"):
            return f"unexpected argument {first!r}: options are written --key value"
        first = first.lstrip("-")
        if key and owner:  # a field of one of the class's arguments, such as model.decode.beam_sise
            argument, _, field = first.rpartition(".")
            kind = next(iter(_hinted(owner, argument)), None)
            home = registry.class_path(kind) if isinstance(kind, type) else None
            return unknown_option(f"{key}.{first}", _parameters(home), field, home)
        return unknown_option(first, options)
    if match := re.match(r"^the following arguments are required: (.*)$", complaint):
        missing = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        if not {"model", "data"}.issuperset(missing.split(", ")):
            return f"{key or owner or 'the configuration'} needs {missing}, which has no default"
        return f"{missing} missing: give a configuration, such as --config configs/vision/digits.yaml"
    name = path[-1] if path else ""
    if match := _NAME.match(complaint):
        return unknown_option(f"{key}={match[1]}", _class_names(owner, name, kinds), match[1])
    if owner and (match := _NO_CLASS.match(complaint)):
        return unknown_option(f"{key}={owner}", _classes_of(match[1]), owner, listed=False)
    if owner and _NO_MODULE.match(complaint):
        near = difflib.get_close_matches(owner.rpartition(".")[2], _class_names(outer, name, kinds), n=1)
        where = f"{one_line(complaint)}, neither installed, nor on PYTHONPATH, nor in the working folder"
        return f"{key}={owner} does not exist: {where}" + (f"; did you mean {near[0]!r}?" if near else "")
    if match := _NAME.search(text, text.index(complaint)):  # a name that may be a class's, among other kinds
        near = difflib.get_close_matches(match[1], _class_names(owner, name, kinds), n=1)
        if near:
            return f"{key}={match[1]} does not exist; did you mean {near[0]!r}?"
    wanted = re.match(r"^Expected an? (<class '[\w.]+'>|(?:typing\.)?Literal\[[^\]]*\])", complaint)
    value = re.search(r"(?:Got value|Given value): (.*)", text[text.index(complaint) :])
    if wanted and value:
        if (written := _class_path_in(value[1])) and load_class(written) is None:
            known = [*_class_names(owner, name, kinds), *registry.TRAINER]
            return unknown_option(f"{key}={written}", known, written.rpartition(".")[2], listed=False)
        return f"{key}={value[1].strip()} is not {_one_of(kinds or wanted[1])}"
    if key == "config":
        return one_line(complaint)
    return one_line(f"{key}: {complaint}" if key else complaint)


def _class_path_in(value: str) -> str | None:
    """Return the class path of a mapping that a message shows; None where it shows another value."""
    try:
        shown = ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return None
    return shown.get("class_path") if isinstance(shown, dict) else None


def _one_of(kinds: str) -> str:
    """Put jsonargparse's list of an option's types in words: "of type int", or "one of" types and choices."""
    names: list[str] = []
    for name, choices, other in _KIND.findall(kinds):
        kind = map(str, ast.literal_eval(choices)) if choices else [name or other.removeprefix("typing.")]
        names += [n for n in kind if n and n != "NoneType" and n not in names]
    if len(names) == 1 and "Literal" not in kinds:
        return f"of type {names[0]}"
    return f"one of {', '.join(names)}"


def unknown_option(
    shown: str, valid: Iterable[str], name: str | None = None, owner: str | None = None, listed: bool = True
) -> str:
    """Return the line on an option or a class that does not exist.

    Args:
        shown: the option as the user wrote it.
        valid: the names that exist; the nearest is suggested.
        name: the name that is compared with them; None: ``shown``.
        owner: the class whose options they are.
        listed: whether all of them are named where none is near.
    """
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name or shown, valid, n=1, cutoff=0.5)
    if near:
        return f"{shown} does not exist; did you mean {near[0]!r}?"
    if owner and valid:
        return f"{shown} does not exist; {owner.rpartition('.')[2]} has {', '.join(valid)}"
    return f"{shown} does not exist" + (f"; there is {', '.join(valid)}" if listed and 0 < len(valid) <= 12 else "")


def _parameters(class_path: str | None) -> list[str]:
    kind = load_class(class_path)
    return [parameter.name for _, parameter in constructor_parameters(kind)] if isinstance(kind, type) else []


def _class_names(owner: str | None, parameter: str, kinds: str = "") -> list[str]:
    """Return the names of the classes that a parameter of ``owner`` may be.

    Args:
        owner: a class path; None: the parameter is one of the command line's own, such as "model".
        parameter: its name.
        kinds: jsonargparse's list of its types, if there is one.
    """
    if owner is None and parameter in ("model", "data"):
        return list(app_classes(parameter))
    bases = [load_class(one or other) for one, other in _BASE.findall(kinds)]
    if owner is not None and not bases:
        bases = _hinted(owner, parameter)
    known = (k for base in bases if isinstance(base, type) for k in registry.subclasses(base))
    return [k.__name__ for k in known if not inspect.isabstract(k)]


def _hinted(owner: str, parameter: str) -> list[Any]:
    """Return the types that a parameter of the class at a path is hinted to be; none where there is no such hint."""
    kind = load_class(owner)
    try:
        hint = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__).get(parameter)
    except (NameError, TypeError, AttributeError):
        return []
    return list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]


def _classes_of(module: str) -> list[str]:
    """Return the class paths of the public classes of an imported module."""
    values = vars(importlib.import_module(module)).items()
    return [f"{module}.{name}" for name, value in values if isinstance(value, type) and not name.startswith("_")]
