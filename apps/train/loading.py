"""Checkpoints from outside a training: the model of one, and what the configuration beside it may name.

A checkpoint is data. It names its model and the model's configs, and those names are looked up among the classes of the
apps and those that the program has imported: nothing is imported because a file says so. See docs/security.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from apps import registry
from apps.base.messages import excerpt
from apps.train.checkpoint_paths import find_checkpoint
from apps.train.contents import read_checkpoint
from apps.train.module import SparseModule
from apps.train.offloading import offload as offload_experts
from apps.train.offloading import room_for_experts
from apps.train.quantising import quantise
from core.config.plain import arguments_from_plain


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    quantize: str | None = None,
    offload: str | None = None,
) -> Any:
    """Return the trained model of a run, of any app, ready to predict.

    Every app's model has ``predict``, which takes what its users have: a table or a path of one (recommenders), image
    files (vision), strings (translation and language models).

    Args:
        path: a run's folder or a checkpoint, as ``find_checkpoint`` takes it.
        device: where the weights go.
        quantize: how experts are quantised, such as "int8" or "int4:64"; None: they stay as they are.
        offload: how much of the experts is on the device, such as "0.5" or "64MB:experts.safetensors"; see
            ``core.offload_experts`` and ``core.OffloadedExperts.of(model)``. None: all of them. What goes to a file is
            never in memory as a whole.

    Returns:
        The ``SparseModule`` in evaluation mode. It knows what its checkpoint keeps of the data (classes, columns,
        subwords), so that no training data are needed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, or of a model whose class has not been imported; or its experts cannot be
            quantised or offloaded.

    Example::

        model = apps.load("runs/digits")
        model.predict(["three.png"])
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    with room_for_experts(offload):
        model = module_class(checkpoint, file).restored(checkpoint, str(file)).eval()
    if quantize is not None:
        quantise(model, quantize)
    if offload is not None:
        offload_experts(model, offload, device)
    return model.to(device)


def module_class(checkpoint: Mapping[str, Any], path: Path) -> type[SparseModule]:
    """Return the class of the model that a checkpoint is of: an app's, or one that the program has imported.

    Args:
        checkpoint: its contents.
        path: its file, for messages.

    Raises:
        ValueError: the checkpoint names no class, or one that is neither.
    """
    name = checkpoint.get("module_class")
    if not isinstance(name, str):
        raise ValueError(f"{path} does not say which model it is of: load it by load_from_checkpoint of its class")
    kind = _public_class(name, SparseModule)
    if kind is not None:
        return kind
    short = name.rpartition(".")[2]
    moved = f"; the apps have a {registry.full_path(short)}" if short in registry.MODULES else ""
    raise ValueError(
        f"{path} holds a model of class {name}, which no app has and nothing has imported: a checkpoint imports "
        f"nothing. If you trust the class, import its module first, or name it in --config{moved}"
    )


# ---- the configuration beside a checkpoint


def check_beside(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a configuration that lies beside a checkpoint and names more than registered classes.

    Args:
        config: its contents.
        path: its file, for messages.

    Raises:
        ValueError: naming the key, what it names, and that ``--config`` trusts the file.
    """
    try:
        _check_beside(config)
    except ValueError as error:
        raise ValueError(
            f"{path} lies beside the checkpoint, and such a file may name registered classes alone: {error}; if you "
            f"trust it, give --config {path}"
        ) from None


def _check_beside(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in ("model", "data"):
            name = value if isinstance(value, str) else value.get("class_path") if isinstance(value, Mapping) else None
            kind = _public_class(name, LightningDataModule if key == "data" else SparseModule)
            if kind is None:
                raise ValueError(f"{key}={excerpt(name)} is neither a class of the apps nor one that is imported")
            if isinstance(value, Mapping):
                if extra := set(value) - {"class_path", "init_args"}:
                    raise ValueError(f"{key} has {sorted(map(str, extra))[0]!r} beside class_path and init_args")
                arguments_from_plain(kind, value.get("init_args") or {}, key)
        elif key == "trainer":
            _check_trainer(value, "trainer")
        elif value is not None and key not in ("seed_everything", "run_dir", "ckpt_path"):
            raise ValueError(f"{key} is no part of a run's configuration")


def _public_class(name: Any, base: type) -> Any:
    """Return the class below ``base`` that the apps have, or that the program has imported; None: there is none."""
    if not isinstance(name, str):
        return None
    if registry.full_path(name) is not None:
        kind = registry.resolve(name)
        return kind if issubclass(kind, base) else None
    return next((k for k in registry.subclasses(base)[1:] if name == registry.class_path(k)), None)


def _check_trainer(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if "class_path" in value and not _is_trainer_part(path):
            raise ValueError(f"{where} names {excerpt(path)}")
        for name, inner in value.items():
            if name not in ("class_path", "default_root_dir"):
                _check_trainer(inner, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check_trainer(inner, f"{where}.{i}")
    elif isinstance(value, str) and ("." in value or Path(value).exists()):  # a class, or the path of another file
        raise ValueError(f"{where}={excerpt(value)}")


def _is_trainer_part(path: Any) -> bool:
    if not isinstance(path, str):
        return False
    own = path.rpartition(".")[2] in registry.TRAINER and registry.full_path(path) is not None
    return own or path in registry.LIGHTNING
