"""A resumed run is exact: its random generators continue from the checkpoint's state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from apps.train.lightning_internals import ResumedLoop, validates_next


class GeneratorState(Callback):
    """Saves the state of the random generators (``random``, numpy, torch on CPU and CUDA) and restores it on resuming.

    Each process of a distributed run has its own state, saved by rank; with another number of processes none is
    restored.
    """

    def __init__(self) -> None:
        self._to_restore: Mapping[str, Any] | None = None
        self._before_validation: Mapping[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [self._before_validation or generator_state()]
        if trainer.world_size > 1:
            own, states = states, [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own[0])
        checkpoint["generators"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        trainer.fit_loop.__class__ = ResumedLoop
        states = checkpoint.get("generators", [])
        self._to_restore = states[trainer.global_rank] if len(states) == trainer.world_size else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # This comes last before the first step: set-up, the sanity check and the data loaders draw numbers too.
        if self._to_restore is not None:
            restore_generators(self._to_restore)
            self._to_restore = None
        self._before_validation = generator_state()  # a resumed run may start with one

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # The loader of a validation draws before any hook of the validation.
        self._before_validation = generator_state() if validates_next(trainer) else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = None


def generator_state() -> dict[str, Any]:
    """Return the state of this process's random generators in plain numbers and tensors."""
    name, keys, pos, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(pos), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set this process's random generators to a ``generator_state``."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
