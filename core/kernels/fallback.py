"""The warning that another backend runs than the one that was asked for."""

from __future__ import annotations

import warnings
from functools import cache

import torch


def warn_once(message: str) -> None:
    """Warn of each message once per process, but not while code is compiled: that traces and does not run."""
    if not torch.compiler.is_compiling():
        _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
