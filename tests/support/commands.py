"""A command that has to fail."""

from __future__ import annotations

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
