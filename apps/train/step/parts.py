"""One part of the data that a model was trained on, such as a language pair, and the model for only this part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataPart:
    """One part of the data.

    Attributes:
        task: its number for routers that ask for the task.
        arguments: arguments of a model for only this part.
        data: arguments of the data for that model.
        select: returns the examples of this part in a batch; None: it has none.
    """

    task: int
    arguments: Mapping[str, Any]
    data: Mapping[str, Any]
    select: Callable[[Any], Any]
