"""A checkpoint on the command line: the arguments that it remembers, of model and data, and whether it fits them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule

from apps.base.messages import excerpt
from apps.cli.classes import find_class, named_class_path
from apps.cli.configs import at, merge, read_config
from apps.cli.errors import UsageError
from apps.registry import differences, full_path, name_of
from apps.train.checkpoint.contents import FOR_TRAINING, check_class, unlike
from apps.train.checkpoint.loading import module_class
from apps.train.sparsified import SparsifiedModule, SparsifyConfig, check_sparsified
from core.config.plain import arguments_from_plain, to_plain


def remembered(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    model: type | None,
    path: Path,
    data_may_grow: bool = False,
) -> dict[str, Any]:
    """Return the model's arguments that the checkpoint remembers, if it has the class that the configuration names.

    Args:
        checkpoint: contents of the checkpoint.
        config: the user's configuration, which decides the class if it names one.
        model: the class that it names; None: it names none.
        path: the checkpoint's file, for messages.
        data_may_grow: whether to leave out the arguments that the data decide, which may have more values now.

    Raises:
        ValueError: the checkpoint names a class that is not registered, or holds a text where a config belongs.
    """
    kind, hparams = checkpoint.get("module_class"), checkpoint.get("hyper_parameters")
    if not kind or not hparams:
        return {}
    if not isinstance(kind, str) or not isinstance(hparams, Mapping):
        raise ValueError(f"{path} is damaged: its module_class or hyper_parameters are of the wrong type")
    named = named_class_path("model", config)
    if named is None:
        model, named = module_class(checkpoint, path), full_path(kind) or kind
    if model is None or name_of(model) != kind:  # a missing class or another one is reported later
        return {}
    arguments_from_plain(model, hparams, f"{path}: model")
    decided = getattr(model, "data_arguments", ()) if data_may_grow else ()
    return {"model": {"class_path": named, "init_args": {k: v for k, v in hparams.items() if k not in decided}}}


def check_fits(checkpoint: Mapping[str, Any], model: LightningModule, path: Path) -> None:
    """Raise a ``ValueError`` that names the options that differ if a checkpoint's tensors are not the model's."""
    check_class(checkpoint, model, str(path))
    check_sparsified(checkpoint, model, path)
    detail = unlike(checkpoint["state_dict"], model)
    if not detail:
        return
    own = getattr(model, "sparsify_arguments", None)
    there, here = checkpoint.get("hyper_parameters", {}), getattr(model, "hparams", {}) if own is None else own
    shapeless = tuple(f"model.{name}" for name in FOR_TRAINING)
    differing = [row for row in differences(there, here, "model") if not row[0].startswith(shapeless)]
    if isinstance(model, SparsifiedModule):
        section = to_plain(model.sparsify_config, SparsifyConfig)
        differing += differences(checkpoint["sparsify"], section, "sparsify")
    if differing:
        clash = "; ".join(f"{k}={excerpt(a)} in the checkpoint, {excerpt(b)} here" for k, a, b in differing[:3])
        raise ValueError(f"{path} does not fit this model: {clash} ({detail})")
    raise ValueError(f"{path} does not fit this model: {detail}")


def with_remembered_data(config: Mapping[str, Any], flags: list[str], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the arguments of the data that the data's class names in ``from_checkpoint``.

    They come from the checkpoint's model, which has arguments of the same names, unless they are written by hand. A
    place that is written by hand is the model's, too.
    """
    kind = find_class("data", config)
    names = getattr(kind, "from_checkpoint", ())
    written = config.get("data")
    written = written if isinstance(written, Mapping) else {}
    arguments = written["init_args"] or {} if "init_args" in written else written
    hparams = checkpoint.get("hyper_parameters") or {}
    filled, model = {}, config.get("model")
    for name in names:
        option = re.compile(rf"--data\.(init_args\.)?{name}([.=+].*)?", re.DOTALL)
        by_hand = any(option.fullmatch(flag) for flag in flags)
        if by_hand and name in getattr(kind, "places", ()) and isinstance(model, Mapping):
            own = {k: v for k, v in (model.get("init_args") or {}).items() if k != name}
            config = {**config, "model": {**model, "init_args": own}}
        if not by_hand and arguments.get(name) is None and hparams.get(name) is not None:
            filled[name] = hparams[name]
    if not filled or kind is None:
        return dict(config)
    arguments_from_plain(kind, filled, "the checkpoint: data")
    path = named_class_path("data", config)
    arguments = {k: v for k, v in arguments.items() if k != "class_path"}
    return {**config, "data": {"class_path": path, "init_args": {**arguments, **filled}}}


def check_superseded(config: Mapping[str, Any], flags: list[str], checkpoint: Path) -> None:
    """Raise an error for flags that the checkpoint's values override: ``superseded`` of the data's class.

    Flags that the checkpoint's run was given too may stay.

    Raises:
        UsageError: a flag has no effect; the message names it.
    """
    kind = find_class("data", config)
    for name, by in getattr(kind, "superseded", {}).items():
        if at(config, ("data", "init_args", by)) is None:
            continue
        beside = checkpoint.parent.parent / "config.yaml"
        of_run = at(read_config(beside), ("data", "init_args")) if beside.is_file() else None
        option = re.compile(rf"--data\.(?:init_args\.)?({name}(?:\.\w+)*)(?:=(.*))?", re.DOTALL)
        for flag, following in itertools.pairwise([*flags, ""]):
            if not (match := option.fullmatch(flag)):
                continue
            value, known = yaml.safe_load(match[2] or following), at(of_run, match[1].split("."))
            both = isinstance(value, Mapping) and isinstance(known, Mapping)
            if known != (merge(known, value) if both else value):
                raise UsageError(
                    f"data.{match[1]}={value} has no effect: {checkpoint} brings its {by} along; leave it out"
                )
