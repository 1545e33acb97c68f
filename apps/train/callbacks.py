"""Callbacks and the checkpoint file: what makes a killed run resume as if nothing had happened."""

from __future__ import annotations

import csv
import math
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from apps.base.files import naming, os_error, replacing, temporary_path
from apps.train import sharded
from apps.train.run_folder import put_aside
from apps.train.stopping import StopsSoon


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite. The message names the step, the terms and what to try."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a kill or a full disk leaves the old file as it was."""

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """A checkpoint's contents; the shards of a folder put together."""
        if sharded.is_sharded(path):
            return sharded.read(path)
        return super().load_checkpoint(path, map_location, weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if sharded.is_sharded(path):  # of an earlier run on several processes; a file cannot replace a folder
            sharded.remove(path)
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

    Both are written at the end of an epoch, after its validation; ``last.ckpt`` also between two steps of an epoch,
    every ``every_n_minutes`` or ``every_n_steps``, and when SIGTERM has come. A model with a weight that is not finite
    is never written.

    Args:
        dirpath: the folder; None: ``checkpoints`` in the trainer's ``default_root_dir``.
        monitor: the logged value that decides the best; None: the module's own ``monitor``, else "val/loss".
        mode: "min" or "max"; None: the module's own ``monitor_mode``, else "min".
        every_n_minutes: minutes of training between two writings of ``last.ckpt`` within an epoch; None: none.
        every_n_steps: steps between them; None: none.

    Raises:
        ValueError: a mode that is neither, or an interval that is not positive.
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
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode={mode!r} is not one of 'min', 'max'")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes={every_n_minutes} must be positive")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.dirpath, self.monitor, self.mode = dirpath, monitor, mode
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.best_score: float | None = None
        self._saved_at = time.monotonic()
        self._saved_step = 0

    @property
    def best_model_path(self) -> str:
        path = os.path.join(self.dirpath or "", "best.ckpt")
        return path if os.path.exists(path) else ""

    @property
    def last_model_path(self) -> str:
        path = os.path.join(self.dirpath or "", "last.ckpt")
        return path if os.path.exists(path) else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")
        self.monitor = self.monitor or getattr(pl_module, "monitor", "val/loss")
        self.mode = self.mode or getattr(pl_module, "monitor_mode", "min")
        if stage == "fit" and trainer.is_global_zero:
            for name in ("best.ckpt", "last.ckpt"):  # of a run that was killed while it wrote
                temporary_path(Path(self.dirpath, name)).unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero and not trainer.ckpt_path and not trainer.fast_dev_run:
            self._put_aside()

    def _put_aside(self) -> None:
        """Checkpoints of an earlier run go to ``earlier/``: "last" must not mean that run's."""
        folder, names = Path(self.dirpath or ""), ("best.ckpt", "last.ckpt", "average.ckpt")
        found = [path for path in (folder / name for name in names) if path.exists()]
        if found:
            put_aside(folder, found, names)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._due(trainer):
            return
        loop = trainer.fit_loop.epoch_loop
        # Not within an accumulation: its gradients would be lost. Not before a validation or an epoch's end: Lightning
        # would resume after them.
        if loop._should_accumulate():
            return
        if trainer.global_step == self._saved_step:
            if (stops := StopsSoon.of(trainer)) is not None:
                stops.written(trainer)
            return
        if loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        assert self.monitor is not None
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and trainer.fit_loop.epoch_loop._should_check_val_epoch():
            score = float(value)
            sign = 1 if self.mode == "max" else -1
            if math.isfinite(score) and (self.best_score is None or sign * score > sign * self.best_score):
                self.best_score = score
                self._save(trainer, pl_module, "best.ckpt")
        # After the best: the last one remembers its score.
        self._save(trainer, pl_module, "last.ckpt")

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        broken = [n for n, p in pl_module.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            raise NonFiniteError(
                f"{broken[0]} is not finite after step {trainer.global_step} ({len(broken)} such parameters); the "
                "checkpoint was not written. Try a lower model.optimizer.lr or trainer.gradient_clip_val=1.0"
            )
        for logger in trainer.loggers:
            logger.save()
        # weights_only=False is the default, which Lightning notes where it is not said.
        trainer.save_checkpoint(os.path.join(self.dirpath or "", name), weights_only=False)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor") == self.monitor:
            self.best_score = state_dict["best_score"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            continue_logs(trainer, checkpoint["global_step"])


class GeneratorState(Callback):
    """Saves the state of the random generators (``random``, numpy, torch on CPU and CUDA) and restores it on resuming.

    Each process of a distributed run has its own state, saved by rank; with another number of processes none is
    restored.
    """

    def __init__(self) -> None:
        self._to_restore: Mapping[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [generator_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, generator_state())
        checkpoint["generators"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        # With max_steps, Lightning restarts *inside* an epoch that the checkpoint has finished: it would count the
        # epoch twice and leave out a batch. Without the distinction it goes on with the next one, as with max_epochs.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        states = checkpoint.get("generators", [])
        self._to_restore = states[trainer.global_rank] if len(states) == trainer.world_size else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Last before the first step: set-up, the sanity check and the data loaders draw numbers too.
        if self._to_restore is not None:
            restore_generators(self._to_restore)
            self._to_restore = None


def generator_state() -> dict[str, Any]:
    """The state of this process's random generators, of plain numbers and tensors."""
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


class WeightEMA(Callback):
    """An exponential moving average of the weights, used in validation and kept in the checkpoint.

    After optimizer step t the average moves by ``1 - d`` towards the weights, with ``d = min(decay, (1 + t) / (10 +
    t))``, so that a short run is not an average of its start. A checkpoint holds the average as ``state_dict``, what
    test and predict load; the weights being trained are under ``trained_state_dict``. Buffers that are not floating
    point follow the model. (Lightning's EMAWeightAveraging deep-copies the module with its metrics, averages with the
    full decay from the first step, and warns whenever a checkpoint is tested.)

    Args:
        decay: in (0, 1), such as 0.999.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = _averaged(pl_module)
        if self.average:  # of the checkpoint
            self.average = {name: self.average[name].to(value.device) for name, value in state.items()}
        else:
            self.average = {name: value.detach().clone() for name, value in state.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        with torch.no_grad():
            state = _averaged(pl_module)
            torch._foreach_lerp_([self.average[n] for n in state], [v.detach() for v in state.values()], 1 - decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The trained module is left with the average, so that a test in the same program sees what a later one will.
        self._swap(pl_module)
        self.average = {}

    def _swap(self, pl_module: LightningModule) -> None:
        if not self.average:  # validation without training: the weights are the checkpoint's, the average already
            return
        with torch.no_grad():
            for name, value in _averaged(pl_module).items():
                trained = value.detach().clone()
                value.copy_(self.average[name])
                self.average[name].copy_(trained)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.average:
            return
        checkpoint["trained_state_dict"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.average}
        checkpoint["ema_step"] = self._step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "trained_state_dict" not in checkpoint:
            return
        names = _averaged(pl_module).keys()
        self.average = {n: v.clone() for n, v in checkpoint["state_dict"].items() if n in names}
        self._step = checkpoint["ema_step"]
        pl_module.load_state_dict(checkpoint["trained_state_dict"])


def _averaged(module: LightningModule) -> dict[str, Tensor]:
    """The tensors of the state dict that have an average: the floating-point ones."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if _floating(value)}


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class EpochLines(Callback):
    """Prints a line an epoch with the values of the progress bar."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        values = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
        total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        seconds = time.monotonic() - self._started
        self._print(f"epoch {trainer.current_epoch + 1}{total}  {values}  ({seconds:.1f} s)")

    def _print(self, line: str) -> None:
        print(line, flush=True)


class ProgressBar(EpochLines, RichProgressBar):
    """A rich bar for the epoch that runs, and a line for each one that is done.

    The bar is erased where its pass ends, before others print what they found in it.
    """

    def __init__(self) -> None:
        RichProgressBar.__init__(self, leave=False)
        EpochLines.__init__(self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        EpochLines.on_train_epoch_start(self, trainer, pl_module)
        RichProgressBar.on_train_epoch_start(self, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        RichProgressBar.on_train_epoch_end(self, trainer, pl_module)
        EpochLines.on_train_epoch_end(self, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        RichProgressBar.on_validation_epoch_end(self, trainer, pl_module)
        if trainer.state.fn == "validate":
            self._stop_progress()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def _init_progress(self, trainer: Trainer) -> None:
        RichProgressBar._init_progress(self, trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def _print(self, line: str) -> None:
        if self.progress is None:
            print(line, flush=True)
        else:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _get_train_description(self, current_epoch: int) -> str:
        """Counted from 1, as in the lines."""
        total = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f"/{total}" if total and total > 0 else "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The running values alone: those of an epoch are in its line."""
        metrics = RichProgressBar.get_metrics(self, trainer, pl_module)
        kept = {k: v for k, v in metrics.items() if k.startswith("train/")}
        return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kept.items()}


def progress() -> Callback:
    """A bar and a line an epoch on a terminal; elsewhere the lines alone."""
    return ProgressBar() if sys.stdout.isatty() else EpochLines()


class MetricsCSV(Logger):
    """``metrics.csv`` in a folder, a row a step, written at once and continued where a resumed run goes on.

    Rows of steps that the checkpoint had not reached are dropped on resuming, so that the file of a killed and resumed
    run is that of an unbroken one. (Lightning's CSVLogger deletes the file on resuming.)
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self._keys: list[str] = []
        self._before: int | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self.folder

    @property
    def log_dir(self) -> str:
        return self.folder

    @property
    def path(self) -> Path:
        return Path(self.folder) / "metrics.csv"

    def continue_from(self, step: int) -> None:
        """Keep the rows of the steps before ``step``."""
        self._before = step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in the run's ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **{k: float(v) for k, v in metrics.items()}}
        new = [k for k in row if k not in self._keys]
        if not new:
            with naming(self.path), open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._keys).writerow(row)
            return
        rows = self._kept_rows()
        self._keys += [k for k in dict.fromkeys(k for r in rows for k in r) if k not in self._keys]
        self._keys += [k for k in row if k not in self._keys]
        with naming(self.path), replacing(self.path, newline="") as file:
            writer = csv.DictWriter(file, self._keys)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _kept_rows(self) -> list[dict[str, Any]]:
        """The rows to carry over into a file with more columns: this run's, at first those before the resumed step."""
        first = not self._keys
        if not self.path.exists() or (first and self._before is None):
            return []
        with open(self.path, newline="") as file:
            rows = [r for r in csv.DictReader(file) if (r.get("step") or "").isdigit()]  # a kill may cut the last row
        return [r for r in rows if not first or int(r["step"]) < self._before]  # type: ignore[operator]


class EventLog(TensorBoardLogger):
    """TensorBoard's curves; what its writer cannot write is an error that names the folder.

    (It writes in a thread of its own, whose error comes up at a later call, as one of a value that is not supported.)
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        with naming(self.log_dir):
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with naming(self.log_dir):
            super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        with naming(self.log_dir):
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            with naming(self.log_dir):
                super().finalize(status)
        except OSError:
            if status == "success":  # else what ended the run is told, which may be this
                raise


def continue_logs(trainer: Trainer, step: int) -> None:
    """Tell the loggers that the run goes on from optimizer step ``step``."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.continue_from(step)
