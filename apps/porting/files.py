"""A published checkpoint's folder: ``config.json``, and weights in safetensors or torch files, whole or in shards."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.files import new_file, replacing
from apps.base.messages import first_line

CONFIG = "config.json"
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter, as PEFT names them."""
INDEX = ".index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        ValueError: it is missing, or not a JSON object with a ``model_type`` and a ``vocab_size``.
    """
    config = read_json(folder / CONFIG)
    check_config(config, folder / CONFIG)
    return config


def check_config(config: Mapping[str, Any], path: Path, *sizes: str) -> None:
    """Raise a ``ValueError`` if a configuration lacks ``model_type``, ``vocab_size`` or one of ``sizes``."""
    kinds: dict[str, tuple[type, str]] = {"model_type": (str, "a name")}
    for name, (kind, kind_name) in (kinds | dict.fromkeys(("vocab_size", *sizes), (int, "an integer"))).items():
        if config.get(name) is None:
            raise ValueError(f"{path} says no {name}")
        if type(config[name]) is not kind:
            raise ValueError(f"{path} says {name}={config[name]!r}, which is not {kind_name}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for.

    Args:
        folder: of the first there is: the safetensors file, its shards, torch's file, its shards.
        safetensors, torch_file: names of the files.

    Raises:
        ValueError: there is none, or a file that is not what its name says.
    """

    def __init__(self, folder: Path, safetensors: str = SAFETENSORS, torch_file: str = TORCH) -> None:
        self._files: dict[Path, Mapping[str, Tensor]] = {}
        for name, open_file in ((safetensors, Safetensors), (torch_file, _read_torch)):
            self._open: Callable[[Path], Mapping[str, Tensor]] = open_file
            if (folder / name).is_file():
                self._path = dict.fromkeys(self._file(folder / name), folder / name)
                return
            if (folder / (name + INDEX)).is_file():
                self._path = shards(folder / (name + INDEX))
                return
        raise ValueError(f"{folder} holds no weights: neither {safetensors} nor {torch_file}, nor an index of shards")

    def _file(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._files:
            self._files[path] = self._open(path)
        return self._files[path]

    def __getitem__(self, name: str) -> Tensor:
        path = self._path[name]
        try:
            return self._file(path)[name]
        except KeyError:
            raise ValueError(f"{path} does not hold tensor {name!r}, which the index says it does") from None

    def __contains__(self, name: object) -> bool:
        return name in self._path

    def __iter__(self) -> Iterator[str]:
        return iter(self._path)

    def __len__(self) -> int:
        return len(self._path)


def shards(index: Path) -> dict[str, Path]:
    """Return the file of each tensor, as an index names it.

    Raises:
        ValueError: the index cannot be read, has no ``weight_map``, or names a file of another folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is no file of its folder")
    return {tensor: index.parent / name for tensor, name in names.items()}


class Safetensors(Mapping[str, Tensor]):
    """The tensors of one file by name, each mapped when it is asked for.

    Raises:
        ValueError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    try:
        # weights_only: a pickle could run any code.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and is not read") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds no tensors by name")
    return tensors


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``, then ``config.json``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / SAFETENSORS, {name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    with replacing(folder / CONFIG) as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write("\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, which are contiguous and share no memory, as one file, whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = new_file(path)
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
