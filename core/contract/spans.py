"""The names by which a profiler shows the parts of an MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

from ..torch_internals import is_profiled

P = ParamSpec("P")
R = TypeVar("R")


def span(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator under which a function's calls are a range ``name`` in a running profiler's trace.

    Without a profiler, and in compiled code, the function is called as it is.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not is_profiled():
                return function(*args, **kwargs)
            with record_function(name):
                return function(*args, **kwargs)

        return wrapper

    return decorate
