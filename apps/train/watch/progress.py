"""The progress of a training or an evaluation: a bar on a terminal, one line per epoch, and the time of the end."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

import core
from apps.base.progress import Bar, bar, end_time
from apps.train.lightning_internals import ErasedProgressBar, of_epochs
from apps.train.step.balance import balance_of, routing_metrics

_ROUTING = {"routing/load_imbalance": "imbalance", "routing/drop_rate": "dropped"}

_DRAWN_EVERY = 0.25
_LINE_EVERY = 60.0

WIDE = 140
"""Columns of a terminal on which the bar with the use of the experts and its end fits one line; a bar of two lines is
erased with a line above it."""


def routing_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the experts' use for bars, by its name on the bar, from the figures of ``routing_metrics``."""
    return {shown: float(metrics[name]) for name, shown in _ROUTING.items() if name in metrics}


def last_step(trainer: Trainer) -> float:
    """Return the optimizer step at which a training will end by its steps or epochs; infinite if none is set."""
    steps = float("inf") if trainer.max_steps < 0 else float(trainer.max_steps)
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0:
        return steps
    return min(steps, epochs * (-(-float(trainer.num_training_batches) // trainer.accumulate_grad_batches)))


class EpochLines(Callback):
    """Prints one line per epoch with the values of the progress bar, and the time at which the training will end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._started = time.monotonic()  # a resumed run may start at an epoch's end
        self._first = self._last = (time.time(), 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = self._last = (time.time(), trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()
        self._last = (time.time(), trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        values = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
        total = of_epochs(trainer)
        seconds = f"{time.monotonic() - self._started:.1f} s"
        end = end_time(self._first, (time.time(), trainer.global_step), last_step(trainer))
        self._print(f"epoch {trainer.current_epoch + 1}{total}  {values}  ({seconds}{end and f'; ends {end}'})")

    def _print(self, line: str) -> None:
        print(line, flush=True)


class LogLines(EpochLines):
    """Prints one line per minute as well, in a log that would be silent until a long epoch ends."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        seconds, step = time.time() - self._last[0], trainer.global_step
        if seconds < _LINE_EVERY or not trainer.is_global_zero:
            return
        total, last = of_epochs(trainer), last_step(trainer)
        parts = [
            f"epoch {trainer.current_epoch + 1}{total}",
            f"step {step:,}{'' if math.isinf(last) else f'/{last:,.0f}'}",
        ]
        if outputs and outputs.get("loss") is not None:
            parts.append(f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.4g}")
        parts.append(f"{(step - self._last[1]) / seconds:.3g} steps/s")
        self._last = (time.time(), step)
        end = end_time(self._first, self._last, last)
        self._print("  ".join([*parts, f"ends {end}"] if end else parts))


class ProgressBar(EpochLines, ErasedProgressBar):
    """Shows a rich bar for the running epoch of a training, and prints a line for each finished one.

    The bar is erased at the end, before results are printed.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _print(self, line: str) -> None:
        if self.progress is None:
            print(line, flush=True)
        else:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the running values; the line of an epoch has the others."""
        metrics = super().get_metrics(trainer, pl_module)
        kept = {k: v for k, v in metrics.items() if k.startswith("train/")}
        end = ""
        if self.progress is not None and self.progress.console.width >= WIDE:
            kept |= routing_figures(trainer.callback_metrics)
            end = end_time(self._first, (time.time(), trainer.global_step), last_step(trainer))
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kept.items()}
        return values | ({"ends": end} if end else {})


class PassBar(Callback):
    """Shows a bar for a pass over data, with the use of the experts so far: ``validate``, ``test`` or ``predict``.

    The bar is erased at the end of the pass. Where one is on the terminal already, it is a row below that one.
    """

    def __init__(self) -> None:
        self._stack, self._recording, self._drawn = contextlib.ExitStack(), contextlib.ExitStack(), 0.0
        self._bar: Bar | None = None
        self._tape: core.Tape | None = None
        self._stats = core.RoutingStats({})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._begin("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predictions", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._count(self._routing_so_far(pl_module))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._count(self._routing_so_far(pl_module))

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._is_due and balance_of(pl_module) is not None:
            self._tape = self._recording.enter_context(core.record(pl_module))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._recording.close()
        figures = None
        if self._tape is not None:  # no one else counts the routing of predictions
            self._stats = self._stats + core.RoutingStats.from_tape(self._tape)
            figures, self._tape, self._drawn = routing_metrics(self._stats), None, time.monotonic()
        self._count(figures)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, name: str, batches: Sequence[float]) -> None:
        total = sum(batches)
        self._bar = self._stack.enter_context(bar(name, total if math.isfinite(total) else None))
        self._drawn, self._stats = 0.0, core.RoutingStats({})

    @property
    def _is_due(self) -> bool:
        """Whether figures are shown, and are old."""
        return self._bar is not None and self._bar.is_drawn and time.monotonic() - self._drawn > _DRAWN_EVERY

    def _routing_so_far(self, module: LightningModule) -> Mapping[str, Any] | None:
        if not self._is_due or (balance := balance_of(module)) is None:
            return None
        self._drawn = time.monotonic()
        return balance.so_far()

    def _count(self, figures: Mapping[str, Any] | None) -> None:
        if self._bar is not None:
            self._bar.show(self._bar.done + 1, figures=None if figures is None else routing_figures(figures))

    def _end(self) -> None:
        self._bar = self._tape = None
        self._recording.close()
        self._stack.close()


def progress(command: str) -> Callback:
    """Return the callback that shows the progress of a command: bars on a terminal, else lines of a training."""
    if command == "fit":
        return ProgressBar() if sys.stdout.isatty() else LogLines()
    return PassBar()
