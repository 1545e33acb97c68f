"""A pretrained folder: a model as ``config.json`` and safetensors, without the state of a training.

``config.json`` has the contents of a checkpoint as plain values: the class of the model, its arguments, and the meaning
of its data's numbers. ``model.safetensors`` is its ``state_dict``; ``encoding.safetensors`` has the other tensors, such
as vocabularies. All of it is data: nothing in the folder can run code, or name a class that is not registered.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from apps.base.files import folder_beside, put_folder, replacing
from apps.porting.files import Safetensors, read_json, write_safetensors
from apps.train.checkpoint.paths import PRETRAINED, is_hub_folder, is_pretrained

WEIGHTS, ENCODING = "model.safetensors", "encoding.safetensors"
FORMAT, FORMAT_VERSION = "moesaic", 1

_TENSOR, _TUPLE, _BYTES, _FLOAT, _PAIRS = "$tensor", "$tuple", "$bytes", "$float", "$pairs"
_MARKS = (_TENSOR, _TUPLE, _BYTES, _FLOAT, _PAIRS)
"""A mapping with one of these as its only key stands for a value that JSON does not have."""


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Make a folder next to ``folder``, and move it there once the block has ended without an error.

    Raises:
        ValueError: ``folder`` holds files, and is not a pretrained folder that may be replaced.
    """
    _check_free(folder, overwrite)
    with folder_beside(folder) as temporary:
        yield temporary
        _check_free(folder, overwrite)
        put_folder(temporary, folder)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if not any(folder.iterdir()):
        return
    if not (is_pretrained(folder) and _is_own(folder)):
        first = sorted(path.name for path in folder.iterdir())[0]
        raise ValueError(f"{folder} holds {first}, and save_pretrained has not made it: it stays; give another folder")
    if not overwrite:
        raise ValueError(f"{folder} holds a model: it stays as it is; give another folder, or overwrite=True")


def _is_own(folder: Path) -> bool:
    try:
        return read_json(folder / PRETRAINED).get("format") == FORMAT
    except ValueError:
        return False


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write the contents of a checkpoint into an empty folder.

    Args:
        folder: the folder.
        contents: ``state_dict`` and plain values; they may hold tensors.

    Raises:
        ValueError: a value that is neither plain nor a tensor, or a tensor that is sharded over processes.
        OSError: the disk is full.
    """
    rest = dict(contents)
    state = rest.pop("state_dict")
    weights, shared, others = _parted(state)
    tensors: dict[str, Tensor] = {}
    model = _to_json({**rest, "other_state": others}, "", tensors)
    write_safetensors(folder / WEIGHTS, weights)
    if tensors:
        write_safetensors(folder / ENCODING, tensors)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, "moesaic_version": _own_version()}
    with replacing(folder / PRETRAINED) as file:
        json.dump({**config, "shared_tensors": shared, "model": model}, file, indent=1, allow_nan=False)
        file.write("\n")


def read(folder: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint that ``write`` wrote; tensors of a file are mapped.

    Raises:
        ValueError: a file is missing or damaged, or the folder is another program's.
    """
    path = folder / PRETRAINED
    config = read_json(path)
    if is_hub_folder(folder):
        raise ValueError(
            f"{folder} is a folder of transformers: give --config configs/hub/finetune.yaml --data.folder {folder} "
            "--ckpt_path none"
        )
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} is of no model that save_pretrained wrote: it has no format={FORMAT!r}")
    if config.get("format_version") != FORMAT_VERSION:
        of = config.get("format_version")
        raise ValueError(f"{path} has format_version={of!r}, and this version of the suite reads {FORMAT_VERSION}")
    shared = config.get("shared_tensors")
    if not isinstance(shared, dict):
        raise ValueError(f"{path} is damaged: it has no shared_tensors")
    state: dict[str, Any] = dict(Safetensors(folder / WEIGHTS))
    encoding = Safetensors(folder / ENCODING) if (folder / ENCODING).exists() else {}
    try:
        contents = _from_json(config.get("model"), encoding)
        state |= {name: state[of] for name, of in shared.items()}
        state |= contents.pop("other_state")
    except (KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    # What Lightning asks of every checkpoint.
    loading = {"pytorch-lightning_version": lightning.__version__, "epoch": 0, "global_step": 0}
    return {**loading, **contents, "state_dict": state}


def _parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return the tensors of a state, the other names of tensors with several, and the values that are not tensors."""
    weights: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    others: dict[str, Any] = {}
    names: dict[Any, str] = {}
    memories: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            others[name] = value
            continue
        _check_whole(name, value)
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in names:
            shared[name] = names[place]
        else:
            names[place] = name
            weights[name] = _alone(value, memories)
    return weights, shared, others


def _alone(value: Tensor, memories: set[int]) -> Tensor:
    """Return a tensor on the CPU that fills its memory, which no tensor before it had; ``memories`` are theirs."""
    whole = value.detach().cpu().contiguous()
    memory = whole.untyped_storage()
    if memory.nbytes() != whole.nbytes or memory.data_ptr() in memories:
        whole = whole.clone()
    memories.add(whole.untyped_storage().data_ptr())
    return whole


def _check_whole(name: str, value: Tensor) -> None:
    if isinstance(value, DTensor) or type(value).__name__ == "ShardedTensor":
        raise ValueError(f"{name} is sharded over processes: save the model of its checkpoint, apps.load(checkpoint)")
    if value.is_meta:
        raise ValueError(f"{name} has a shape and no values: load the model's weights before it is saved")


def _to_json(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON has it, and put its tensors into ``tensors`` by their places."""
    if isinstance(value, Tensor):
        _check_whole(place, value)
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # a view may share memory
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        inner = {key: _to_json(item, f"{place}.{key}" if place else str(key), tensors) for key, item in value.items()}
        plain = all(isinstance(key, str) for key in inner) and not (len(inner) == 1 and next(iter(inner)) in _MARKS)
        return inner if plain else {_PAIRS: [[_to_json(k, place, tensors), v] for k, v in inner.items()]}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"{place} is a {type(value).__qualname__}: a pretrained folder keeps plain values and tensors")


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what ``_to_json`` made JSON of."""
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value)) if len(value) == 1 else None
    inner: Any = value[mark] if mark in _MARKS else None
    if mark == _TENSOR:
        return tensors[inner]
    if mark == _TUPLE:
        return tuple(_from_json(item, tensors) for item in inner)
    if mark == _BYTES:
        return base64.b64decode(inner, validate=True)
    if mark == _FLOAT:
        return float(inner)
    if mark == _PAIRS:
        return {_from_json(key, tensors): _from_json(item, tensors) for key, item in inner}
    return {key: _from_json(item, tensors) for key, item in value.items()}


def _own_version() -> str:
    try:
        return version("moesaic")
    except PackageNotFoundError:  # the code also runs uninstalled
        return "source"
