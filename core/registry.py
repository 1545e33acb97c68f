"""The config classes that a file may name: a checkpoint makes these and no others, and imports nothing."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from .fields import check_fields

_REGISTERED: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register_config(kind: T) -> T:
    """Let checkpoints and adopted configurations make a config class. Use it as a decorator, above ``@dataclass``.

    Router, expert and multi-gate configs register themselves (``OpenConfig``). A dataclass of yours that is an
    argument of your own module needs this, or the module's checkpoint cannot be loaded.

    Example::

        @core.register_config
        @dataclass(frozen=True)
        class TowerConfig:
            width: int = 64
    """
    _REGISTERED[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return kind


class OpenConfig:
    """Base of the configs that may be of several classes, a user's own among them.

    A subclass registers itself when it is defined, and its plain form names its class.
    """

    prefix = ""  # not annotated: jsonargparse looks names of annotations up in the module of each subclass
    """Text before a field's name in messages, such as "tower."."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if OpenConfig not in cls.__bases__:  # RouterConfig and its like are bases themselves
            register_config(cls)

    def __post_init__(self) -> None:
        check_fields(self, self.prefix)


def is_registered(kind: type) -> bool:
    """Return whether a class is registered under its own path."""
    return _REGISTERED.get(f"{kind.__module__}.{kind.__qualname__}") is kind


def registered_config(class_path: object) -> type:
    """Return the registered class of a path such as ``core.TokenChoice`` or ``my_module.MyRouter``.

    A class of ``core`` also goes by ``core.NAME``, and any class by its plain name if it is the only one of that
    name, or the one of ``core``. Nothing is imported.

    Raises:
        ValueError: no class of that path has been registered.
    """
    if isinstance(class_path, str):
        if class_path in _REGISTERED:
            return _REGISTERED[class_path]
        package, _, name = class_path.rpartition(".")
        if package in ("", "core"):
            named = {path: kind for path, kind in _REGISTERED.items() if kind.__qualname__ == name}
            own = [kind for path, kind in named.items() if path.startswith("core.")]
            if own or (len(named) == 1 and not package):
                return (own or list(named.values()))[0]
    names = {path.rpartition(".")[2] for path in _REGISTERED}
    near = difflib.get_close_matches(str(class_path).rpartition(".")[2], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; import the module of a class of yours first"
    raise ValueError(f"class_path={class_path!r} is not a registered config class{hint}")
