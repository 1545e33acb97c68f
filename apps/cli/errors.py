"""Exceptions to one line each. jsonargparse reports a typo in fifteen lines that end in "Expected a NoneType"."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from typing import Any

from apps import registry
from apps.base.messages import EveryProcessError, message, one_line
from apps.base.progress import is_first_process
from apps.cli.classes import load_class

_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but |Problem with given class_path .*instantiat)"
)
_KEY = re.compile(r'^Parser key "([^"]+)":\s*(.*)$')
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':\s*(.*)$")
_NO_OPTION = re.compile(
    r"^(?:(?:Group '(\w+)'|Subcommand '\w+') does not accept option|Option|unrecognized arguments:) '?-*([^'=\s]+)"
)
_MISSING = re.compile(r"^the following arguments are required: (.*)$")
_NAME = re.compile(r"Expected a dot import path string: (.+)$", re.MULTILINE)
_NO_CLASS = re.compile(r"^(?:module '[\w.]+' has no attribute|No module named) ")
_KIND = re.compile(r"<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?Literal\[([^\]]*)\]")
_VALUE = re.compile(r"(?:Got value|Given value): (.*)")


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
    if is_first_process() or not isinstance(error, EveryProcessError):
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
    is_unmapped = isinstance(root, ImportError) and "failed to map segment" in str(root)
    if type(root).__name__ == "OutOfMemoryError" or isinstance(root, MemoryError) or is_unmapped:
        return "out of memory: try a smaller data.batch_size, or trainer.precision=bf16-mixed", 1
    if isinstance(root, OSError):
        return _os_error(root), 1
    plain = type(root).__name__ in ("MisconfigurationException", "SafetensorError")  # the latter of a full disk
    if isinstance(root, (ValueError, RuntimeError)) or plain:
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
    complaint = kinds = ""
    for raw in text.splitlines():
        line = raw.strip().removeprefix("- ").strip()
        while match := _KEY.match(line) or _CLASS.match(line):
            if match.re is _KEY:
                path.append(match[1])
            else:
                owner = match[1]
            line, kinds = match[2].strip(), ""
        if line.startswith("Subtypes: "):
            kinds = line.removeprefix("Subtypes: [").removesuffix("]")
        if line and not _NOISE.match(line):
            complaint = line
            break
    key = ".".join(path)
    value = _VALUE.search(text, text.index(complaint))
    if match := _NO_OPTION.match(complaint):
        name, (argument, _, field) = match[2], match[2].rpartition(".")
        if not (key and owner):
            return unknown_option(f"{match[1]}.{name}" if match[1] else name, options)
        hint = _parameters(owner).get(argument)
        home = registry.class_path(hint) if isinstance(hint, type) else None if argument else owner
        return unknown_option(f"{key}.{name}", _parameters(home), field, home)
    if match := _MISSING.match(complaint):
        return f"{key or 'the configuration'} needs {match[1]}, which has no default"
    match = _NAME.search(text, text.index(complaint))
    written = match[1] if match else owner if _NO_CLASS.match(complaint) else None
    near = difflib.get_close_matches((written or "").rpartition(".")[2], _class_names(), n=1) if written else []
    if written and (near or not value or not complaint.startswith("Expected a <")):
        why = f": {one_line(complaint)}" if _NO_CLASS.match(complaint) else ""
        if complaint.startswith("No module"):
            why += ", neither installed, nor on PYTHONPATH, nor in the working folder"
        return f"{key}={written} does not exist{why}" + (f"; did you mean {near[0]!r}?" if near else "")
    if value and (complaint.startswith("Expected") or not complaint):
        wanted = _KIND.sub(lambda m: m[1] or m[2].replace("'", ""), kinds or complaint.partition(". ")[0])
        wanted = ", ".join(dict.fromkeys(re.sub(r"^Expected an? |, NoneType\b", "", wanted).split(", ")))
        return f"{key}={value[1].strip()} is not {'one of' if ',' in wanted else 'of type'} {wanted}"
    return one_line(f"{key}: {complaint}" if key not in ("", "config") else complaint or text)


def unknown_option(
    shown: str, valid: Iterable[str], name: str | None = None, owner: str | None = None, listed: bool = True
) -> str:
    """Return the line on an option or a class that does not exist.

    Args:
        shown: the option as the user wrote it.
        valid: the names that exist; the nearest is suggested.
        name: the name that is compared with them; None: ``shown``.
        owner: the class whose options they are.
        listed: whether all of them are named if none is near.
    """
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name or shown, valid, n=1, cutoff=0.5)
    if near:
        return f"{shown} does not exist; did you mean {near[0]!r}?"
    if owner and valid:
        return f"{shown} does not exist; {owner.rpartition('.')[2]} has {', '.join(valid)}"
    return f"{shown} does not exist" + (f"; there is {', '.join(valid)}" if listed and 0 < len(valid) <= 12 else "")


def _parameters(class_path: str | None) -> dict[str, Any]:
    """Return the types of a class's parameters, by name."""
    from apps.cli.jsonargparse_internals import parameters_of

    kind = load_class(class_path)
    return {p.name: p.annotation for p in parameters_of(kind)} if isinstance(kind, type) else {}


def _class_names() -> list[str]:
    """Return the names of the classes that a configuration may name, of ours and of Lightning."""
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    from core.registry import OpenConfig

    known = (kind for base in (OpenConfig, Callback, Logger) for kind in registry.subclasses(base))
    names = (kind.__name__ for kind in known if not inspect.isabstract(kind))
    return [*registry.MODELS, *registry.DATA, *registry.TRAINER, *names]
