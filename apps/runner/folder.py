"""A folder of work belongs to one piece of work and to one process at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps import registry
from apps.base.files import holding
from apps.base.progress import Bar, bar


@contextlib.contextmanager
def at_work(folder: Path, what: str, title: str = "") -> Iterator[Bar]:
    """Make and hold the folder of a comparison, a suite or a verdict inside, and yield the bar over all of its work.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder / ".lock", f"another {what} is at work in {folder}"), bar(title or what) as whole:
        yield whole


def check_same(folder: Path, what: str, saved: Any, wanted: Any) -> None:
    """Refuse a folder whose work was begun with other options.

    Args:
        folder: the folder.
        what: what is in it, such as "comparison".
        saved: plain values that its work was begun with.
        wanted: those of now.

    Raises:
        ValueError: they differ; the message names the first three differences.
    """
    lines = differences(saved, wanted)
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(
            f"{folder} holds another {what} ({'; '.join(lines[:3])}{more}): give another --output, or delete it"
        )


def differences(saved: Any, wanted: Any) -> list[str]:
    """Return a line for each value that differs between two plain values, by its dotted name.

    Example::

        differences({"lr": 1, "seeds": 3}, {"lr": 1, "seeds": 5})     # ["seeds: 3 saved, 5 now"]
    """
    found = registry.differences(saved, wanted)
    return [f"{name}: {json.dumps(there)} saved, {json.dumps(here)} now" for name, there, here in found]
