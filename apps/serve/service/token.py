"""The token that a request must bring. It comes from a file or the environment: ``ps`` shows a command line to all."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MOESAIC_TOKEN"
_SHORTEST = 16


def read_token(file: Path | None) -> str | None:
    """Return the token of a file, else that of the variable ``MOESAIC_TOKEN``; None: there is neither.

    Raises:
        ValueError: the file cannot be read, or the token is short or has other characters than visible ASCII ones. The
            message does not show it.
    """
    if file is None:
        name, text = VARIABLE, os.environ.get(VARIABLE, "")
        if not text:
            return None
    else:
        name = f"token_file={file}"
        try:
            text = file.read_text("ascii").strip()
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            text = "\0"
    if any(not "!" <= c <= "~" for c in text):
        raise ValueError(f"{name} must hold one token of visible ASCII characters")
    if len(text) < _SHORTEST:
        raise ValueError(f"{name} has a token of {len(text)} characters: it must have at least {_SHORTEST}")
    return text
