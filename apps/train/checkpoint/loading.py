"""Checkpoints from outside a training: the model of one, and the classes that the configuration next to it may name.

A checkpoint is data. It names its model and the model's configs, and those names are looked up among the apps' classes
and classes that the program has imported: nothing is imported because a file says so. See docs/security.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from apps import registry
from apps.base.messages import excerpt
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.paths import find_checkpoint, is_hub_folder
from apps.train.compiling import CompileConfig
from apps.train.cost.offloading import offload as offload_experts, room_for_experts
from apps.train.cost.quantizing import quantize_model
from apps.train.optim.chosen import SECTIONS, is_torchs
from apps.train.sparsified import SparsifiedModule, SparsifyConfig, restored
from core.config.plain import arguments_from_plain, from_plain


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    quantize: str | None = None,
    offload: str | None = None,
) -> LinkedModule | SparsifiedModule:
    """Return the trained model of a run, of any app, ready to predict.

    Every app's model has ``predict``, which takes its users' data: a table or a path of one (recommenders), image files
    (vision), strings (translation and language models).

    Args:
        path: a run's folder or a checkpoint, as ``find_checkpoint`` takes it, or a folder of transformers.
        device: device for the weights.
        quantize: how experts are quantized, such as "int8" or "int4:64"; None: they stay as they are.
        offload: how much of the experts is on the device, such as "0.5" or "64MB:experts.safetensors"; see
            ``core.offload_experts`` and ``core.OffloadedExperts.of(model)``. None: all of them. Predictions that go to
            a file are never in memory as a whole.

    Returns:
        The module in evaluation mode: a ``SparseModule``, or a user's module that was made sparse. It knows the facts
        about the data in its checkpoint (classes, columns, subwords), so that no training data are needed.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the file is damaged, or of a model whose class has not been imported; or its experts cannot be
            quantized or offloaded.

    Example::

        model = apps.load("runs/digits")
        model.predict(["three.png"])
    """
    file = find_checkpoint(path)
    with room_for_experts(offload):
        model = _of_folder(file) if is_hub_folder(file) else _of_checkpoint(file)
        model.eval()
    if quantize is not None:
        quantize_model(model, quantize)
    if offload is not None:
        offload_experts(model, offload, device)
    return model.to(device)


def _of_folder(folder: Path) -> Any:
    return registry.resolve(registry.OF_FOLDER[0])(str(folder))


def _of_checkpoint(file: Path) -> Any:
    checkpoint = read_checkpoint(file)
    kind = module_class(checkpoint, file)
    return restored(kind, checkpoint, file) if "sparsify" in checkpoint else kind.restored(checkpoint, str(file))


def module_class(checkpoint: Mapping[str, Any], path: Path) -> Any:
    """Return the class of a checkpoint's model: an app's, or one that the program has imported.

    Args:
        checkpoint: its contents.
        path: its file, for messages.

    Raises:
        ValueError: the checkpoint names no class, or one that is neither.
    """
    name = checkpoint.get("module_class")
    if not isinstance(name, str):
        raise ValueError(f"{path} does not say which model it is of: load it by load_from_checkpoint of its class")
    kind = _public_class(name, LightningModule if "sparsify" in checkpoint else LinkedModule)
    if kind is not None:
        return kind
    short = name.rpartition(".")[2]
    moved = f"; the apps have a {registry.full_path(short)}" if short in registry.MODELS else ""
    raise ValueError(
        f"{path} holds a model of class {name}, which no app has and nothing has imported: a checkpoint imports "
        f"nothing. If you trust the class, import its module first, or name it in --config{moved}"
    )


# ---- the configuration next to a checkpoint


_NUMBERS = ("seed_everything", "float32_matmul_precision", "threads")

_WORDS = ("accelerator", "deterministic", "devices", "gradient_clip_algorithm", "max_time", "precision", "strategy")
"""Options of the trainer that a configuration beside a checkpoint may set to a word; it sets the others to numbers."""


def check_beside(
    config: Mapping[str, Any], path: Path, without: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the part of a configuration next to a checkpoint that is used, and the trainer's options that are not.

    It decides the model and the data, of registered classes, the seed, plain values of the trainer, an optimizer and a
    scheduler of torch's, and whether the model is compiled.

    Args:
        config: its contents.
        path: its file, for messages.
        without: options of the trainer that the command decides by itself.

    Returns:
        The part of the contents that no parser takes for a class, and the names of values that are left out though no
        command decides them: options of the trainer, and optimizers that are not torch's.

    Raises:
        ValueError: naming the key, its value, and that ``--config`` trusts the file.
    """
    try:
        _check_beside(config)
    except ValueError as error:
        raise ValueError(
            f"{path} lies beside the checkpoint, and such a file may name registered classes only: {error}; if you "
            f"trust it, give --config {path}"
        ) from None
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name not in without}
    plain = {name: value for name, value in trainer.items() if _is_plain(name, value)}
    others = {key: config[key] for key in SECTIONS if key in config}
    trusted = {key: value for key, value in others.items() if is_torchs(key, value)}
    kept = {key: config[key] for key in ("model", "data", "sparsify", "compile", *_NUMBERS) if key in config}
    left_out = [*(f"trainer.{name}" for name in trainer if name not in plain), *(others.keys() - trusted.keys())]
    return {**kept, **trusted, "trainer": plain}, left_out


def _check_beside(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if not value:  # it names nothing
            continue
        if key in ("model", "data"):
            name = value if isinstance(value, str) else value.get("class_path") if isinstance(value, Mapping) else None
            kind = _public_class(name, LightningDataModule if key == "data" else LightningModule)
            if kind is None:
                raise ValueError(f"{key}={excerpt(name)} is neither a class of the apps nor one that is imported")
            if isinstance(value, Mapping):
                if extra := set(value) - {"class_path", "init_args"}:
                    raise ValueError(f"{key} has {sorted(map(str, extra))[0]!r} beside class_path and init_args")
                arguments_from_plain(kind, value.get("init_args") or {}, key)
        elif key == "sparsify":
            from_plain(value, SparsifyConfig, key)
        elif key == "trainer":
            if not isinstance(value, Mapping):
                raise ValueError(f"trainer={excerpt(value)} is not a mapping of the trainer's options")
        elif key == "compile":
            if value is not True:
                from_plain(value, CompileConfig, key)
        elif key not in (*SECTIONS, *_NUMBERS, "run_dir", "ckpt_path", "ladder"):
            raise ValueError(f"{key} is no part of a run's configuration")


def _public_class(name: Any, base: type) -> Any:
    """Return the class below ``base`` that the apps have, or that the program has imported; None: there is none."""
    if not isinstance(name, str):
        return None
    if registry.full_path(name) is not None:
        kind = registry.resolve(name)
        return kind if issubclass(kind, base) else None
    kinds = registry.subclasses(base)[1:]  # a class that was made sparse has the name of the user's
    return next((k for k in kinds if name == registry.class_path(k) and not issubclass(k, SparsifiedModule)), None)


def _is_plain(name: Any, value: Any) -> bool:
    """Return whether a value of an option of the trainer is a number or a word, which names no class and no file."""
    if isinstance(value, str):
        is_word = bool(re.fullmatch(r"-?[a-z0-9_]+([-:,][a-z0-9_]+)*", value))
        return name in _WORDS and is_word and not Path(value).exists()
    numbers = value if isinstance(value, list) else () if value is None else (value,)
    return name in inspect.signature(Trainer).parameters and all(isinstance(n, (int, float)) for n in numbers)
