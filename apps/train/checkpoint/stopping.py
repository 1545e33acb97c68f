"""SIGTERM, which pre-emption and ``timeout`` send, or Ctrl-C ends a training soon and leaves a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from apps.train.lightning_internals import set_received_sigterm


@contextlib.contextmanager
def on_signal(number: signal.Signals, handler: Callable[..., Any]) -> Iterator[None]:
    """Call ``handler`` at a signal inside. An ignored signal stays ignored, as Ctrl-C is for a job in the background.

    In other threads than the main one, which have no handlers, do nothing.
    """
    before = signal.getsignal(number)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class StopsSoon(Callback):
    """Ends a training of one process at SIGTERM or Ctrl-C: after the optimizer step, or in a validation at once.

    Either leaves a checkpoint; a validation's checkpoint is the state before it, and resuming validates again. A second
    signal does not wait. Lightning by itself waits for the end of the validation batch, which may be a decoded batch of
    half a minute, and writes nothing. Several processes stop as Lightning has them, by a message from the first one.

    Attributes:
        asked: True once a signal has come, while the training continues until a checkpoint can be written.
        validates: whether a batch of a validation is at work; True after one that was cut.
        first_step: optimizer step at which the training began or was resumed.
    """

    def __init__(self) -> None:
        self.asked, self.validates, self.first_step = False, False, 0
        self._training: Trainer | None = None
        self._error: type[BaseException] | None = None

    @staticmethod
    def of(trainer: Trainer) -> StopsSoon | None:
        """Return the trainer's callback of this kind that has been asked to stop; None if none has."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, StopsSoon) and c.asked), None)

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals inside; Lightning's handler of SIGTERM, which is set later, calls this one.

        Raises:
            SIGTERMException, KeyboardInterrupt: the training has been stopped, by which signal.
        """
        with on_signal(signal.SIGTERM, self._stop), on_signal(signal.SIGINT, self._stop):
            try:
                yield
            except SIGTERMException:
                raise (self._error or SIGTERMException) from None

    def _stop(self, number: int, *_: Any) -> None:
        trainer, self._error = self._training, KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
        callbacks = trainer.checkpoint_callbacks if trainer is not None and trainer.world_size == 1 else ()
        waits = any(getattr(callback, "writes_when_stopped", False) for callback in callbacks)
        if trainer is not None and not waits and self._error is SIGTERMException:
            return  # Lightning ends the training after the step
        if trainer is None or not waits or self.asked:
            self.asked = False
            raise self._error
        self.asked = True
        set_received_sigterm(trainer, False)  # it would stop before a checkpoint is written
        os.write(2, b"\nstopping with a checkpoint; the same signal once more does not wait for it\n")
        if self.validates:
            raise SIGTERMException

    def written(self, trainer: Trainer) -> None:
        """Let Lightning log the step and end the training, whose checkpoint is written."""
        set_received_sigterm(trainer, True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training, self.first_step = trainer, trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:  # the checkpoint of the epoch's end comes next
            self.written(trainer)

    # Between the batches other callbacks may be changing weights, as an average does: there nothing is cut.
    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.validates = True
        if self.asked and self._error is not None:
            raise SIGTERMException

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.validates = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = None
