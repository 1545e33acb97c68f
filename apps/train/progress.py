"""The progress of a training: a bar for the running epoch on a terminal, and a line for each finished one."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class EpochLines(Callback):
    """Prints a line an epoch with the values of the progress bar."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._started = time.monotonic()  # a resumed run may begin at an epoch's end

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
        seconds = time.monotonic() - self._started
        self._print(f"epoch {trainer.current_epoch + 1}{total}  {values}  ({seconds:.1f} s)")

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
        return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kept.items()}


def progress() -> Callback:
    """Return a bar and a line an epoch on a terminal, or only the lines without one."""
    return ProgressBar() if sys.stdout.isatty() else EpochLines()
