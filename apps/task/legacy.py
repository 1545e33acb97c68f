"""Tasks of rooms that say each use in a module of its own; this file goes when the last of them has a task."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def room_task(room: str, own: str | None = None) -> Any:
    """Return what stands for a task: it has the methods that serve, demo, export and verdict ask for.

    Args:
        room: the dotted path of the room, with modules ``service``, ``exhibit`` and ``export``.
        own: module with ``config_for``; None: there is none.
    """

    class RoomTask:
        columns: tuple[str, ...] = ()

        def __init__(self, model: Any) -> None:
            self.model = model

        def service(self) -> Any:
            return importlib.import_module(f"{room}.service").service(self.model)

        def exhibit(self, data: Any, most: int) -> Any:
            return importlib.import_module(f"{room}.exhibit").exhibit(self.model, data, most)

        def exported(self) -> Any:
            return importlib.import_module(f"{room}.export").export(self.model)

        @staticmethod
        def attach(model: Any, graphs: Mapping[str, Any]) -> None:
            importlib.import_module(f"{room}.export").attach(model, graphs)

        @staticmethod
        def encoding_state(exported: Any) -> Any:
            return importlib.import_module(f"{room}.export").encoding_state(exported)

        @staticmethod
        def own_data(given: Any) -> Any:
            return None if own is None else importlib.import_module(own).config_for(given)

    return RoomTask
