"""Defaults that jsonargparse does not know: values that replace null, and the defaults of named configs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

import yaml

import core
from apps.cli.classes import find_class, load_class, named_class_path
from apps.cli.configs import at
from apps.cli.flags import NULLS, given, with_flags
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


def with_own_defaults(config: Mapping[str, Any], flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``config`` with every option of the config classes that it or the flags name, and the other flags.

    (If another class than a default's is named, jsonargparse keeps the default's values of options with the same
    name: ``core.SwiGLU`` instead of a default ``FFN(activation="gelu")`` would compute GELU.)

    Example::

        with_own_defaults({"model": {"expert": {"class_path": "core.SwiGLU"}}}, [])
        # {"model": {"expert": {"class_path": "core.SwiGLU", "init_args": {"activation": "silu", ...}}}}, []
    """

    def is_taken(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
        model = merged.get("model")
        inside = names[0] == "model" and len(names) > 1 and isinstance(model, Mapping) and "class_path" in model
        # A null of a class that an earlier flag names, as ``with_classes_and_nulls`` takes one of a class in a file.
        is_null = value in NULLS and isinstance(at(merged, names[:-1]), Mapping)
        return names[0] == "sparsify" or (inside and (is_null or _config_class(value) is not None))

    def plain(value: str) -> Any:
        return yaml.safe_load(value) if _config_class(value) is None else {"class_path": value}

    # All flags of sparsify are laid over the file's: the parser would take an abbreviated one.
    merged, rest = with_flags(config, flags, is_taken, plain)
    return {k: _filled(v) if k in ("model", "sparsify") else v for k, v in merged.items()}, rest


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    inner = {k: _filled(v) for k, v in value.items()}
    kind = _config_class(value["class_path"]) if "class_path" in value else None
    if kind is None:
        return inner

    own, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.default is not dataclasses.MISSING:
            own[field.name] = to_plain(field.default, hints[field.name])
        elif field.init and field.default_factory is not dataclasses.MISSING:
            own[field.name] = to_plain(field.default_factory(), hints[field.name])
    given = inner.get("init_args")
    return {**inner, "init_args": {**own, **(given if isinstance(given, Mapping) else {})}}


def _config_class(name: Any) -> Any:
    """Return the config class that the user names, imported if need be; None if it is none, as a typing error."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return None
    if name.partition(".")[0] not in ("core", "apps"):
        with contextlib.suppress(ImportError):  # the parser reports it
            load_class(name)
    try:
        return core.registered_config(name)
    except ValueError:
        return None
