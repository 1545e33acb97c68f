"""A command that has to fail, and a full disk."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import pytest

from apps.cli import main


def fails(capsys: pytest.CaptureFixture, code: int, *argv: str) -> str:
    """Run a command that must end with ``code`` and one line on stderr, after notes; return that line."""
    capsys.readouterr()
    assert main(list(argv)) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if "parameters" not in x and " train, " not in x]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Let no file grow past ``most`` bytes inside, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
