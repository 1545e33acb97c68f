"""Values in force where an argument of a model or its data is null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.cli.classes import find_class, named_class_path
from apps.cli.flags import NULLS, given
from core.config.plain import to_plain


def with_stand_ins(part: str, flags: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the values in force if an argument of the model or data is null or not given.

    See ``SparseModule.defaults_of_none``. A null that means nothing, such as "no MoE layer", stays.
    """
    kind, path = find_class(part, config), named_class_path(part, config)
    stand_ins = getattr(kind, "defaults_of_none", None)
    written = config.get(part)
    written = {"class_path": written} if isinstance(written, str) else dict(written or {})
    if stand_ins is None:
        return dict(config)

    arguments = written.get("init_args") or {} if {"class_path", "init_args"} & written.keys() else written
    options = ((name.removeprefix(f"{part}."), value) for name, value in given(flags))
    by_flag = {name: None if value in NULLS else value for name, value in options}
    # "backbone.name" gives a backbone, whatever the file says.
    parts = {name.partition(".")[0] for name in by_flag if "." in name}
    begun: dict[str, Any] = {name: {} for name in parts if arguments.get(name) is None}
    filled = {
        name: to_plain(value, type(value))
        for name, value in stand_ins({**arguments, **by_flag, **begun}).items()
        # A flag that names a class, or the whole, starts from nothing: it would keep the stand-in's arguments.
        if arguments.get(name) is None and not {name, f"{name}.class_path"} & by_flag.keys()
    }
    others = {"dict_kwargs": written["dict_kwargs"]} if "dict_kwargs" in written else {}
    return {**config, part: {"class_path": path, "init_args": {**arguments, **filled}, **others}}
