"""Messages of errors, on one line."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Sequence

# torch puts the traceback of a DataLoader's worker or thread into the message of the error that it raises again.
_CAUGHT = re.compile(
    r"\ACaught (\w+) in [^\n]*\.\nOriginal Traceback.*^(?:\w+\.)*\1(?:: |$)(.*)\Z", re.DOTALL | re.MULTILINE
)


class EveryProcessError(OSError):
    """An error that every process of a run raises, so that it is enough if the first one says it."""


def message(error: BaseException) -> str:
    """Return the message of ``error``, without the traceback that a DataLoader's worker puts into it."""
    text = str(error)
    caught = _CAUGHT.match(text)
    return caught[2] if caught else text


def unknown_name(option: str, value: str, valid: Sequence[str]) -> str:
    """Return the message for a name that is not in ``valid``, with the nearest one."""
    near = difflib.get_close_matches(value.lower().replace("-", "_"), valid, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"{option}={value!r} is not one of {', '.join(valid)}{suggestion}"


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` of the names, and how many others there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def one_line(text: str) -> str:
    """Return ``text`` with each run of blanks and line ends as one blank."""
    return " ".join(text.split())


def excerpt(value: object, longest: int = 60) -> str:
    """Return a value as it is written, on one line and cut."""
    text = one_line(repr(value))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    return (message(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def warn_once(logger: logging.Logger, text: str) -> None:
    """Log a warning the first time that this process is asked to."""
    logger.warning("%s", text)
