"""What an error says, on one line."""

from __future__ import annotations

import functools
import logging
import re

# torch puts the traceback of a DataLoader's worker or thread into the message of the error that it raises again.
_CAUGHT = re.compile(
    r"\ACaught (\w+) in [^\n]*\.\nOriginal Traceback.*^(?:\w+\.)*\1(?:: |$)(.*)\Z", re.DOTALL | re.MULTILINE
)


def message(error: BaseException) -> str:
    """What ``error`` says; of one from a DataLoader's worker, what that says without its traceback."""
    text = str(error)
    caught = _CAUGHT.match(text)
    return caught[2] if caught else text


def one_line(text: str) -> str:
    """``text`` with each run of blanks and line ends as one blank."""
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its class where it says nothing."""
    return (message(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def warn_once(logger: logging.Logger, text: str) -> None:
    """The same warning once a process."""
    logger.warning("%s", text)
