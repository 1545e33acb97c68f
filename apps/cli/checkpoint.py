"""A checkpoint on the command line: the arguments that it remembers, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from apps.base.messages import excerpt
from apps.cli.configs import differences
from apps.cli.usage import named_class_path
from apps.registry import full_path, name_of
from apps.train.contents import check_class, unlike
from apps.train.loading import module_class
from apps.train.sparsified import SparsifiedModule, SparsifyConfig, check_sparsified
from core.config.plain import arguments_from_plain, to_plain


def remembered(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    model: type | None,
    path: Path,
    data_may_grow: bool = False,
) -> dict[str, Any]:
    """Return the model's arguments that the checkpoint remembers, if it is of the class the configuration names.

    Args:
        checkpoint: contents of the checkpoint.
        config: the user's configuration, which decides the class where it names one.
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
    named = named_class_path("model", (), config)
    if named is None:
        model, named = module_class(checkpoint, path), full_path(kind) or kind
    if model is None or name_of(model) != kind:  # a missing class or another one is reported later
        return {}
    arguments_from_plain(model, hparams, f"{path}: model")
    decided = getattr(model, "data_arguments", ()) if data_may_grow else ()
    return {"model": {"class_path": named, "init_args": {k: v for k, v in hparams.items() if k not in decided}}}


def check_fits(checkpoint: Mapping[str, Any], model: LightningModule, path: Path) -> None:
    """Raise a ``ValueError`` that names the options that differ where a checkpoint's tensors are not the model's."""
    check_class(checkpoint, model, str(path))
    check_sparsified(checkpoint, model, path)
    detail = unlike(checkpoint["state_dict"], model)
    if not detail:
        return
    own = getattr(model, "sparsify_arguments", None)
    there, here = checkpoint.get("hyper_parameters", {}), getattr(model, "hparams", {}) if own is None else own
    shapeless = tuple(
        f"model.{name}" for name in ("optimizer", "ema_decay", "average_last", "grow", "distil", "report")
    )
    differing = [row for row in differences(there, here, "model") if not row[0].startswith(shapeless)]
    if isinstance(model, SparsifiedModule):
        section = to_plain(model.sparsify_config, SparsifyConfig)
        differing += differences(checkpoint["sparsify"], section, "sparsify")
    if differing:
        clash = "; ".join(f"{k}={excerpt(a)} in the checkpoint, {excerpt(b)} here" for k, a, b in differing[:3])
        raise ValueError(f"{path} does not fit this model: {clash} ({detail})")
    raise ValueError(f"{path} does not fit this model: {detail}")
