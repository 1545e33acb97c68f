"""The progress of a training: a bar on a terminal, and a line for each finished epoch, with the time of its end."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

ROUTING = {"routing/load_imbalance": "imbalance", "routing/drop_rate": "dropped"}
"""What the bar shows of the experts' use, by the name in the log."""


WIDE = 140
"""Columns of a terminal on which the bar with the use of the experts and its end fits one line; a bar of two lines is
erased with a line above it."""


def last_step(trainer: Trainer) -> float:
    """Return the optimizer step at which a training will end by its steps or epochs; infinite where none is set."""
    steps = float("inf") if trainer.max_steps < 0 else float(trainer.max_steps)
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0:
        return steps
    return min(steps, epochs * (-(-float(trainer.num_training_batches) // trainer.accumulate_grad_batches)))


def end_time(first: tuple[float, int], now: tuple[float, int], last: float) -> str:
    """Return the time of day at which a training ends at its mean speed until now, such as 14:05; "" if not known yet.

    Args:
        first: time in seconds and step at its start.
        now: the same now.
        last: the step at which it will end.
    """
    done, left = now[1] - first[1], last - now[1]
    if done <= 0 or left <= 0 or left == float("inf"):
        return ""
    end = time.localtime(now[0] + (now[0] - first[0]) / done * left)
    days = end.tm_yday - time.localtime(now[0]).tm_yday
    return time.strftime("%H:%M" if days == 0 else "%H:%M on %d %B", end)


class EpochLines(Callback):
    """Prints a line an epoch with the values of the progress bar, and the time at which the training will end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._started = time.monotonic()  # a resumed run may begin at an epoch's end
        self._first = (time.time(), 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = (time.time(), trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        values = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
        total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        seconds = f"{time.monotonic() - self._started:.1f} s"
        end = end_time(self._first, (time.time(), trainer.global_step), last_step(trainer))
        self._print(f"epoch {trainer.current_epoch + 1}{total}  {values}  ({seconds}{end and f'; ends {end}'})")

    def _print(self, line: str) -> None:
        print(line, flush=True)


class ProgressBar(EpochLines, RichProgressBar):
    """Shows a rich bar for the running epoch, and prints a line for each finished one.

    The bar is erased at the end of its pass, before results are printed.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._stop_progress()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def _print(self, line: str) -> None:
        if self.progress is None:
            print(line, flush=True)
        else:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _get_train_description(self, current_epoch: int) -> str:
        """Return the epoch counted from 1, as in the lines."""
        total = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f"/{total}" if total and total > 0 else "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the running values; the line of an epoch has the others."""
        metrics = super().get_metrics(trainer, pl_module)
        kept = {k: v for k, v in metrics.items() if k.startswith("train/")}
        end = ""
        if self.progress is not None and self.progress.console.width >= WIDE:
            logged = trainer.callback_metrics
            kept |= {shown: float(logged[k]) for k, shown in ROUTING.items() if k in logged}
            end = end_time(self._first, (time.time(), trainer.global_step), last_step(trainer))
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kept.items()}
        return values | ({"ends": end} if end else {})


def progress() -> Callback:
    """Return a bar and a line an epoch on a terminal, or only the lines without one."""
    return ProgressBar() if sys.stdout.isatty() else EpochLines()
