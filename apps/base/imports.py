"""A program imports faster where nobody looks for garbage meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import without looking for garbage, and let no later collection walk through the imported objects.

    The half million objects of torch, Lightning and others stay to the program's end. Looking through them took one
    of the six seconds of processor time of ``moesaic fit`` with two steps on digits. Only the first call of a process
    does so: a later call would keep the user's objects.

    Example::

        with importing():
            import torch
    """
    # Not gc.get_freeze_count(), which walks through all that is kept: a tenth of a second each time.
    if _keep.cache_info().currsize or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _keep()
        gc.enable()


@functools.cache
def _keep() -> None:
    """Keep existing objects from collection, to the program's end; once per process."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # for what Python frees at its end
