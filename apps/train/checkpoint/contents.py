"""The contents of a checkpoint are tensors and plain values, read without a pickle that could run code."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from apps.base.messages import one_line, some
from apps.registry import name_of, of_today, without_dropped
from apps.train.checkpoint import sharded
from apps.train.checkpoint.paths import is_pretrained
from apps.train.publish import pretrained

FOR_TRAINING = ("optimizer", "ema_decay", "average_last", "grow", "distil", "report")
"""Arguments of a model that change neither its shape nor its predictions."""


def read_checkpoint(path: Path | str, shapes_only: bool = False) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU, with the names that its classes have today.

    Tensors of a file are mapped, and read where they are used.

    Options of the model that only earlier versions had are left out.

    Args:
        path: a file, or the folder of a sharded checkpoint or of a pretrained model.
        shapes_only: return only the shapes of sharded tensors, on the meta device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is not a checkpoint.
    """
    checkpoint = _read(path, shapes_only)
    if isinstance(kind := checkpoint.get("module_class"), str):
        checkpoint["module_class"] = name_of(kind)
    if isinstance(arguments := checkpoint.get("hyper_parameters"), Mapping):
        arguments = without_dropped(str(checkpoint.get("module_class")), arguments)
        checkpoint["hyper_parameters"] = of_today(arguments, "model")
    return checkpoint


def _read(path: Path | str, shapes_only: bool) -> dict[str, Any]:
    if sharded.is_sharded(path):
        return sharded.read(path, device="meta" if shapes_only else "cpu")
    if is_pretrained(path):
        return pretrained.read(Path(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    with sharded.readable(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return checkpoint


def check_class(checkpoint: Mapping[str, Any], model: nn.Module, where: str) -> None:
    """Raise a ``ValueError`` if a checkpoint holds another class of model.

    Args:
        checkpoint: its contents; one that names no class passes.
        model: the model that is to have its weights.
        where: the option and the path that name the checkpoint, for the message.
    """
    here = name_of(type(model))
    there = checkpoint.get("module_class", here)
    if there != here:
        raise ValueError(f"{where} holds a model of class {there}, and this run's is of class {here}")


def unlike(state: Mapping[str, Any], model: nn.Module) -> str:
    """Return how the tensors of a checkpoint differ from a model's, by name and shape; "": they do not.

    Args:
        state: ``state_dict`` of the checkpoint.
        model: the model, whose tensors may be on the meta device; a checkpoint may lack its ``kept_elsewhere``.
    """
    there, here = (
        {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}
        for tensors in (state, model.state_dict())
    )
    both = [name for name in here if name in there]
    resized = [f"{name} is {there[name]} there and {here[name]} here" for name in both if there[name] != here[name]]
    elsewhere: frozenset[str] = getattr(model, "kept_elsewhere", frozenset())
    lacking = [name for name in here if name not in there and name not in elsewhere]
    foreign = [name for name in there if name not in here]
    parts = (("", resized), ("the checkpoint lacks ", lacking), ("the model lacks ", foreign))
    return "; ".join(f"{what}{some(names)}" for what, names in parts if names)


def unlike_in_size(state: Mapping[str, Any], made: Callable[[], nn.Module]) -> str:
    """Return ``unlike`` of a model that is made without memory for its weights, or that it has too many of them.

    A damaged file may ask for a model of any size.

    Args:
        state: ``state_dict`` of the checkpoint.
        made: makes the model. Where it cannot be made on the meta device, "" is returned.
    """
    thread, most, seen = threading.get_ident(), 4 * len(state) + 1000, 0  # what is made and replaced counts, too

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal seen
        if threading.get_ident() == thread and (seen := seen + 1) > most:
            raise OverflowError

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return unlike(state, made())
    except OverflowError:
        return f"the checkpoint has {len(state)} tensors, and the model over {most}"
    except Exception as error:
        # Sizes that no tensor can have. Any other model is made again with its weights, which says what is wrong.
        return one_line(str(error)) if "overflow" in str(error) else ""
    finally:
        handle.remove()


def fingerprint(module: nn.Module) -> str:
    """Return a digest of the weights, by a thousand numbers of each: trained on, they all change."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            flat = value.detach().flatten()
            some = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
