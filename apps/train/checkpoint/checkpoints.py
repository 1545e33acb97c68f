"""The checkpoints of a run: the best and the last are kept, and a kill leaves an old file whole."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from apps.base.files import copy_whole, delete, delete_leftovers, os_error, replacing
from apps.base.messages import warn_once
from apps.train.checkpoint import sharded
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.paths import NAMES, is_pretrained
from apps.train.checkpoint.run_folder import put_aside
from apps.train.checkpoint.stopping import StopsSoon
from apps.train.lightning_internals import is_accumulating, rewind_validation, validates_next
from apps.train.optim.averaging import AVERAGE
from apps.train.step.finite import check_weights
from apps.train.watch.logs import MetricsCSV
from core.fields import Count, OneOf, Positive, check_values

_logger = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to its place and moves it there: a kill or a full disk leaves the old file as it was.

    Args:
        mapped: map a file into memory, for a test that needs few of its tensors and keeps none.
    """

    def __init__(self, mapped: bool = False) -> None:
        super().__init__()
        self.mapped = mapped

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Return a checkpoint's contents; the shards of a folder are put together."""
        if self.mapped or sharded.is_sharded(path) or is_pretrained(path):
            return read_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if sharded.is_sharded(path):  # a file cannot replace the folder of an earlier run on several processes
            delete(path)
        try:
            with replacing(path, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError about its zip file, without the reason.
            cause = os_error(error)
            reason = os.strerror(cause.errno) if cause is not None and cause.errno else "the disk may be full"
            kept = "; the earlier one is intact" if path.exists() else ""
            raise OSError(f"cannot write the checkpoint {path}: {reason}{kept}") from error


class BestAndLast(Checkpoint):
    """Keeps ``best.ckpt`` and ``last.ckpt`` in a folder.

    Both are written at the end of an epoch, after its validation; ``best.ckpt`` also after a validation within it, and
    ``last.ckpt`` between two steps of it, every ``every_n_minutes`` or ``every_n_steps``, and when SIGTERM or Ctrl-C
    has come, in a validation too. A model with a weight that is not finite is never written.

    Args:
        dirpath: the folder; None takes ``checkpoints`` in the trainer's ``default_root_dir``.
        monitor: the logged value that decides the best; "-": none; None: the module's ``monitor``, else "val/loss".
        mode: "min" or "max"; None takes that of the module's value, ``monitor_mode``, else "min".
        every_n_minutes: minutes of training between two writings of ``last.ckpt`` within an epoch; None for no limit.
        every_n_steps: steps between them; None for no limit.

    Raises:
        ValueError: a mode that is neither, or none for another value than the module's; or an interval that is not
            positive.
    """

    writes_when_stopped = True

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        every_n_minutes: float | None = 10.0,
        every_n_steps: int | None = None,
    ) -> None:
        check_values(Annotated[str, OneOf("min", "max")] | None, mode=mode)
        check_values(Positive | None, every_n_minutes=every_n_minutes)
        check_values(Count | None, every_n_steps=every_n_steps)
        self.dirpath, self.monitor, self.mode = dirpath, monitor, mode
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.best_score: float | None = None
        self._saved_at = time.monotonic()
        self._saved_step = 0

    @property
    def best_model_path(self) -> str:
        path = os.path.join(self.dirpath or "", "best.ckpt")
        return path if os.path.exists(path) else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")
        own = getattr(pl_module, "monitor", None) or "val/loss"
        self.monitor = self.monitor or own
        if self.mode is None and self.monitor not in (own, "-"):
            raise ValueError(f"BestAndLast: monitor={self.monitor!r} is not the model's, {own}: give mode, min or max")
        self.mode = self.mode or getattr(pl_module, "monitor_mode", "min")
        if stage == "fit" and trainer.is_global_zero:
            for name in ("best.ckpt", "last.ckpt"):  # a run that was killed while it wrote has left them
                delete_leftovers(Path(self.dirpath, name))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        folder = Path(self.dirpath or "")
        if trainer.is_global_zero and trainer.ckpt_path and not trainer.fast_dev_run:
            if Path(trainer.ckpt_path).name != AVERAGE:  # the same command again must find it
                delete(folder / AVERAGE)  # of the training's former end
            self._bring_best(Path(trainer.ckpt_path).with_name("best.ckpt"), folder / "best.ckpt")
        elif trainer.is_global_zero and not trainer.fast_dev_run:
            # "last" must not mean an earlier run's checkpoint.
            earlier = [path for path in (folder / f"{name}.ckpt" for name in NAMES) if path.exists()]
            if earlier:
                print(f"{folder} held checkpoints of an earlier run: they are in {put_aside(folder, earlier)} now")
        self.best_score = trainer.strategy.broadcast(self.best_score)

    def _bring_best(self, there: Path, here: Path) -> None:
        """Copy the best checkpoint from beside the one that is resumed, or forget its score."""
        if self.best_score is None or here.exists():
            return
        if there.exists():
            copy_whole(there, here)
        else:
            _logger.warning("there is no %s, so its %s of %.4g is forgotten", there, self.monitor, self.best_score)
            self.best_score = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._due(trainer):
            return
        # A checkpoint within an accumulation would lose its gradients; before a validation or an epoch's end, Lightning
        # would resume after them.
        if is_accumulating(trainer):
            return
        if trainer.global_step == self._saved_step:
            if (stops := StopsSoon.of(trainer)) is not None:
                stops.written(trainer)
            return
        if trainer.is_last_batch or validates_next(trainer):
            return
        # A step's values reach the log after this hook: with a checkpoint here, a kill in between would lose them.
        logs = trainer.log_every_n_steps
        stops = StopsSoon.of(trainer)
        if logs > 1 and trainer.global_step % logs == 0 and stops is None:
            return
        self._save(trainer, pl_module, "last.ckpt")
        if stops is not None:
            stops.written(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if trainer.fast_dev_run or trainer.sanity_checking:
            return False
        by_step = self.every_n_steps is not None and trainer.global_step - self._saved_step >= self.every_n_steps
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = self.every_n_minutes is not None and minutes >= self.every_n_minutes
        if trainer.world_size > 1:
            return bool(trainer.strategy.broadcast(by_step or by_time))
        return by_step or by_time or StopsSoon.of(trainer) is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if not trainer.is_last_batch:  # the checkpoint of an epoch's end comes after all its hooks
            self._judge(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        every, known = trainer.check_val_every_n_epoch or 1, (*trainer.callback_metrics, "-")
        is_validated = trainer.enable_validation and not (trainer.current_epoch + 1) % every
        if is_validated and trainer.is_global_zero and self.monitor not in known:
            what = f"validation logs no {self.monitor}, so there is no best.ckpt"
            warn_once(_logger, f"{what}: give the model, or BestAndLast, another monitor")
        if trainer.enable_validation:  # a score from within the epoch has been judged, and is not better than itself
            self._judge(trainer, pl_module)
        # The last one remembers the score of the best.
        self._save(trainer, pl_module, "last.ckpt")

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` if the logged score is the best so far."""
        assert self.monitor is not None
        # Where a module logs without sync_dist each rank has a value of its own, and all of them write, or none.
        score = float(trainer.strategy.broadcast(float(trainer.callback_metrics.get(self.monitor, math.nan))))
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(score) and (self.best_score is None or sign * score > sign * self.best_score):
            self.best_score = score
            self._save(trainer, pl_module, "best.ckpt")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if (stops := StopsSoon.of(trainer)) is not None and stops.validates:
            # Lightning restarts a validation that was in a batch; the weights and generators have the state before it.
            rewind_validation(trainer)
            self._save(trainer, pl_module, "last.ckpt")

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        check_weights(pl_module, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()
        # weights_only=False is the default, but Lightning prints a note where it is not given.
        trainer.save_checkpoint(os.path.join(self.dirpath or "", name), weights_only=False)
        if name == "last.ckpt":
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor") == self.monitor:
            self.best_score = state_dict["best_score"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.continue_from(checkpoint["global_step"])
