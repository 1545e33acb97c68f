"""Exceptions to one line each."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterable

from apps import registry
from apps.base.messages import EveryProcessError, message, one_line
from apps.base.progress import is_first_process


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
    if isinstance(error, UsageError):
        return one_line(str(error)), 2
    if isinstance(error, ModuleNotFoundError) and error.name in ("torchrec", "fbgemm_gpu"):
        return f"embedding tables need {error.name}, which is not installed: it is for Linux on x86-64", 1
    is_unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or is_unmapped:
        return "out of memory: try a smaller data.batch_size, or trainer.precision=bf16-mixed", 1
    if isinstance(error, OSError):
        return _os_error(error), 1
    plain = type(error).__name__ in ("MisconfigurationException", "SafetensorError")  # the latter of a full disk
    if isinstance(error, (ValueError, RuntimeError)) or plain:
        return one_line(message(error)) or type(error).__name__, 1
    return f"{type(error).__name__}: {one_line(message(error))} (--traceback shows where)", 1


def _os_error(error: OSError) -> str:
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error.strerror or message(error)) or type(error).__name__


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


def no_class(option: str, name: str, known: Iterable[str]) -> str:
    """Return the line on a class that does not exist.

    Args:
        option: the option that names it.
        name: the name as the user wrote it.
        known: names of classes that exist; the nearest is suggested.
    """
    module, _, short = name.rpartition(".")
    why = ""
    if module:
        try:
            importlib.import_module(module)
            why = f": module {module!r} has no attribute {short!r}"
        except ModuleNotFoundError as error:
            where = ", neither installed, nor on PYTHONPATH, nor in the working folder"
            why = f": No module named {error.name!r}{where}"
    near = difflib.get_close_matches(short, [*registry.MODELS, *registry.DATA, *registry.TRAINER, *known], n=1)
    return f"{option}={name} does not exist{why}" + (f"; did you mean {near[0]!r}?" if near else "")
