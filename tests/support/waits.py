"""What makes the host wait for a GPU in training steps: counted on a CPU, by dispatched operations and read tensors."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).parents[2]
_VALUES = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class Waits(Callback):
    """Counts, between the start and the end of training steps, the operations whose result the host has to know.

    On a GPU each is a wait: a number that is read, a shape that depends on values, a copy to the host.

    Attributes:
        found: the number of each operation, with the function of this repository that asks for it.
    """

    def __init__(self, first: int = 1) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.first, self.steps, self._modes = first, 0, list[Any]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.first and not trainer.is_last_batch:
            self.steps += 1
            self._modes = [_Dispatched(self.found), _Read(self.found)]
            for mode in self._modes:
                mode.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None
        if name in _VALUES or by_mask or repeats:
            _note(self.found, name)
        return func(*args, **kwargs)


class _Read(TorchFunctionMode):
    def __init__(self, found: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            _note(self.found, func.__name__)
        return func(*args, **(kwargs or {}))


def _note(found: Counter[tuple[str, str]], name: str) -> None:
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(_ROOT / top) for top in ("core", "apps")):  # the tree may hold .venv, too
            found[name, f"{path.relative_to(_ROOT)}:{frame.f_lineno}:{frame.f_code.co_name}"] += 1
            return
        if "/torch/optim/" in str(path):  # its steps are on the device under ``fused``
            return
        frame = frame.f_back  # type: ignore[assignment]
    found[name, "elsewhere"] += 1
