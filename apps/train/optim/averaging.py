"""Averages of the weights: a moving average, and the mean of the weights at the ends of the last epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from apps.base.files import copy_whole, replacing
from core.parallel import local_part, part_of, whole_of

_logger = logging.getLogger(__name__)

AVERAGE = "average.ckpt"
FOLDER = "epochs"


class WeightEMA(Callback):
    """Keeps an exponential moving average of the weights, used in validation and saved in the checkpoint.

    After optimizer step t the average moves by ``1 - d`` towards the weights, with ``d = min(decay, (1 + t) / (10 +
    t))``, so that a short run is not an average of its start. A checkpoint holds the average as ``state_dict``, which
    test and predict load, and the weights in training as ``trained_state_dict``. Buffers that are not floating point
    follow the model. (Lightning's EMAWeightAveraging deep-copies the module with its metrics, averages with the full
    decay from the first step, and warns whenever a checkpoint is tested.)
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step, self._is_swapped = 0, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, came = _floating(pl_module), self.average  # from the checkpoint, if there is one
        own = {
            id(value): came[name].to(value.device) if came else value.detach().clone()
            for name, value in _distinct(state).items()
        }
        self.average = {name: own[id(value)] for name, value in state.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        with torch.no_grad():
            state = _distinct(_floating(pl_module))
            own = [local_part(self.average[name]) for name in state]
            torch._foreach_lerp_(own, [local_part(value.detach()) for value in state.values()], 1 - decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._is_swapped:  # a validation was cut, and a checkpoint may follow
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module keeps the average, so that a test in the same program gives the same result as a later one.
        self._swap(pl_module)
        self.average = {}

    def _swap(self, pl_module: LightningModule) -> None:
        if not self.average:  # without training, the checkpoint's weights are the average already
            return
        with torch.no_grad():
            for name, value in _distinct(_floating(pl_module)).items():
                trained = value.detach().clone()
                value.copy_(self.average[name])
                self.average[name].copy_(trained)
        self._is_swapped = not self._is_swapped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.average:
            return
        checkpoint["trained_state_dict"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.average}
        checkpoint["ema_step"] = self._step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "trained_state_dict" not in checkpoint:
            return
        names = _floating(pl_module).keys()
        self.average = {n: v.clone() for n, v in checkpoint["state_dict"].items() if n in names}
        self._step = checkpoint["ema_step"]
        pl_module.load_state_dict(checkpoint["trained_state_dict"])


class WeightAverage(Callback):
    """Writes ``average.ckpt`` next to ``last.ckpt``: a checkpoint with the mean weights of the last epochs' ends.

    Each epoch leaves its weights in ``epochs/<number>.pt`` there, and the last ``num_epochs`` files stay, for a longer
    run needs them; so memory holds one mean, whatever their number, and a training may end at any epoch. All tensors of
    floating point are averaged, also the experts' selection biases; the others are the last epoch's. The trained module
    is left with the mean. A training resumes from the last epoch's weights, which ``average.ckpt`` has as
    ``trained_state_dict``. Without checkpoints no average is written.

    Attributes:
        kept: numbers of the epochs in the average, from 0.
    """

    def __init__(self, num_epochs: int) -> None:
        self.num_epochs = num_epochs
        self.kept: list[int] = []
        self._trained: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None:
            return
        if trainer.is_global_zero:
            self._find_kept(trainer, folder)
        self.kept = trainer.strategy.broadcast(self.kept)

    def _find_kept(self, trainer: Trainer, folder: Path) -> None:
        """Copy the weights of the kept epochs from the run that is resumed, and forget the missing ones."""
        came_from = None if trainer.ckpt_path is None else Path(str(trainer.ckpt_path)).parent / FOLDER
        for epoch in self.kept:
            here = _file(folder, epoch)
            if came_from is not None and came_from != folder and _file(came_from, epoch).exists():
                copy_whole(_file(came_from, epoch), here)
        missing = [epoch for epoch in self.kept if not _file(folder, epoch).exists()]
        if missing:
            _logger.warning(
                "the weights of epochs %s are not beside %s: the average is without them",
                ", ".join(str(epoch + 1) for epoch in missing),
                trainer.ckpt_path,
            )
            self.kept = [epoch for epoch in self.kept if epoch not in missing]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # At the epoch's end the checkpoint that names the kept epochs is not written yet.
        folder = self._folder(trainer)
        if folder is not None and trainer.is_global_zero:
            self._prune(folder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None:
            return
        epoch = trainer.current_epoch
        weights = {}
        for name, value in _floating(pl_module).items():
            whole = whole_of(value.detach())  # by all processes
            if trainer.is_global_zero:
                weights[name] = whole.cpu()
        if trainer.is_global_zero:
            with replacing(_file(folder, epoch), "wb") as file:
                torch.save(weights, file)
        self.kept = [*(e for e in self.kept if e != epoch), epoch][-self.num_epochs :]

    # A run that is resumed after its last epoch has no ``on_train_end``.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None or not self.kept:
            return
        mean = mean_weights([_file(folder, epoch) for epoch in self.kept]) if trainer.is_global_zero else {}
        state = pl_module.state_dict()
        self._trained = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in state.items()}
        with torch.no_grad():
            for name, value in _floating(pl_module).items():
                local_part(value).copy_(part_of(trainer.strategy.broadcast(mean.get(name)), value))
        path = folder.parent / AVERAGE
        trainer.save_checkpoint(path, weights_only=False)
        self._trained = None
        if trainer.is_global_zero:
            self._prune(folder)
            epochs = ", ".join(str(epoch + 1) for epoch in self.kept)
            _logger.info("%s: the mean of the weights after epoch%s %s", path, "s" * (len(self.kept) > 1), epochs)

    def _prune(self, folder: Path) -> None:
        """Remove the files of epochs that are not kept, also an earlier run's."""
        kept = {_file(folder, epoch) for epoch in self.kept}
        for path in folder.glob("*.pt*") if folder.is_dir() else ():
            if path not in kept:
                path.unlink(missing_ok=True)

    def _folder(self, trainer: Trainer) -> Path | None:
        """Return the folder of the epochs' weights; None if the run has no checkpoints."""
        saves = trainer.checkpoint_callbacks[-1:]  # the run's own comes after the user's
        dirpath = getattr(saves[0], "dirpath", None) if saves else None
        return None if trainer.fast_dev_run or not dirpath else Path(dirpath) / FOLDER

    def state_dict(self) -> dict[str, Any]:
        return {"kept": list(self.kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [int(epoch) for epoch in state_dict["kept"]][-self.num_epochs :]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._trained is not None:
            checkpoint["trained_state_dict"] = self._trained
            checkpoint["averaged_epochs"] = list(self.kept)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and "averaged_epochs" in checkpoint:
            pl_module.load_state_dict(checkpoint["trained_state_dict"])


def mean_weights(paths: Sequence[Path]) -> Mapping[str, Tensor]:
    """Return the equal-weighted mean of files of tensors by name, one file in memory at a time, summed in float64."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
            dtypes[name] = value.dtype
            total[name] = total[name].add_(value) if name in total else value.to(torch.float64, copy=True)
    return {name: value.div_(len(paths)).to(dtypes[name]) for name, value in total.items()}


def _file(folder: Path, epoch: int) -> Path:
    return folder / f"{epoch}.pt"


def _floating(module: LightningModule) -> dict[str, Tensor]:
    """Return the tensors of floating point in the state dict, which are averaged."""
    values = module.state_dict(keep_vars=True).items()
    return {name: v for name, v in values if isinstance(v, Tensor) and v.is_floating_point()}


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor once: of the names of a shared one the last, whose value ``load_state_dict`` leaves."""
    return dict({id(value): (name, value) for name, value in state.items()}.values())
