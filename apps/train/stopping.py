"""SIGTERM, which pre-emption and ``timeout`` send, ends a training after at most one step and a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextlib.contextmanager
def on_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Call ``handler`` at SIGTERM inside. In other threads than the main one, which have no handlers, do nothing."""
    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopsSoon(Callback):
    """Ends a training of one process at SIGTERM: after the optimizer step with a checkpoint, in a validation at once.

    Lightning alone waits for the end of the step or of the validation batch, which may be a decoded batch of half a
    minute, and writes nothing. Several processes stop as Lightning has them, by a message from the first one.

    Attributes:
        asked: True once SIGTERM has come, while the training goes on until a checkpoint can be written.
        first_step: optimizer step at which the training began or was resumed.
    """

    def __init__(self) -> None:
        self.asked, self.first_step = False, 0
        self._trainer: Trainer | None = None

    @staticmethod
    def of(trainer: Trainer) -> StopsSoon | None:
        """Return the trainer's callback of this kind that has been asked to stop; None where none has."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, StopsSoon) and c.asked), None)

    def handling(self) -> contextlib.AbstractContextManager[None]:
        """Handle SIGTERM inside; Lightning's handler, which is set later, calls this one."""
        return on_sigterm(self._stop)

    def _stop(self, *_: Any) -> None:
        trainer = self._trainer
        if trainer is not None and (trainer.world_size > 1 or not _writes(trainer)):
            return  # Lightning ends the training after the step
        if trainer is None or not trainer.training or self.asked:  # a second one does not wait
            raise SIGTERMException
        self.asked = True
        trainer._signal_connector.received_sigterm = False  # it would stop before a checkpoint is written

    def written(self, trainer: Trainer) -> None:
        """Let Lightning log the step and end the training, whose checkpoint is written."""
        trainer._signal_connector.received_sigterm = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer, self.first_step = trainer, trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:  # the checkpoint of the epoch's end comes next
            self.written(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = None


def _writes(trainer: Trainer) -> bool:
    """Return whether a callback of the trainer writes a checkpoint when it is asked to stop."""
    return any(getattr(callback, "writes_when_stopped", False) for callback in trainer.checkpoint_callbacks)
