"""The number of torch's threads on a CPU: as given, as a checkpoint keeps it, or measured in a training's first steps.

Only measuring tells: beside another process, small steps with a thread too many take over ten times as long.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from apps.base.checks import check_at_least
from apps.base.machine import set_threads, threads_are_given

_logger = logging.getLogger(__name__)

LEAST, MOST, SECONDS = 5, 20, 1.0
"""Timed steps with each number of threads: at least 5, up to 20 unless they have taken a second."""

WINDOW = 20
"""Steps that are together compared with the choice."""


def threads_of_steps(most: int, chosen: dict[int, float]) -> Generator[int, float, None]:
    """Yield the number of threads of each step, and receive the seconds that it took.

    Steps with ``most`` threads and with half as many take turns. The fewer are taken if their mean is at most a tenth
    longer, and compared with a quarter, and so on. (Means, as a step that waits for a thread may be rare and long.)
    When ``WINDOW`` steps take over twice as long as at the choice, all is measured again.

    Args:
        most: the largest number.
        chosen: is filled with the mean seconds by number of threads, the chosen one last; empty while measured. If it
            is not empty at first, its last number is used.
    """
    while True:
        if not chosen:
            yield from _measure(most, chosen)
        number, seconds = [*chosen.items()][-1]
        taken = 0.0
        for _ in range(WINDOW):
            taken += yield number
        if taken > 2 * WINDOW * seconds:
            chosen.clear()


def _measure(number: int, chosen: dict[int, float]) -> Generator[int, float, None]:
    means: dict[int, float] = {}
    while number > 1:
        more, fewer = times = list[float](), list[float]()
        while not _are_enough(more[1:], fewer[1:]):  # the first of each warms up
            # What is done every tenth step, such as logging, meets both numbers.
            for turn in (0, 1) if len(more) % 2 == 0 else (1, 0):
                times[turn].append((yield number // (1 + turn)))
        means[number], means[number // 2] = (sum(own[1:]) / len(own[1:]) for own in times)
        if means[number // 2] > 1.1 * means[number]:
            break
        number //= 2
    means[number] = means.pop(number)  # the last one
    chosen |= means


def _are_enough(more: list[float], fewer: list[float]) -> bool:
    is_clear = len(more) > 1 and (min(more) > 2 * max(fewer) or min(fewer) > 2 * max(more))
    return is_clear or (len(more) >= LEAST and (sum(more + fewer) > SECONDS or len(more) >= MOST))


class Threads(Callback):
    """Gives a run its threads.

    Args:
        trainer: the trainer of the run.
        given: the user's number; None: it is chosen, unless environment or program have set one.
        checkpoint: contents of the run's checkpoint, whose choice is kept.
        measures: whether the run is a training whose steps may be measured.
        stops: whether the training ends with the choice.

    Attributes:
        number: the number that the run has; 0: torch's.
        is_open: whether the first steps are measured.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        given: int | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        measures: bool = True,
        stops: bool = False,
    ) -> None:
        check_at_least(1, threads=given)
        self.trainer, self.most, self.stops = trainer, torch.get_num_threads(), stops
        is_alone = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        is_free = is_alone and given is None and self.most > 1 and not threads_are_given()
        kept = (checkpoint or {}).get("threads", {}) if is_free else {}
        self.chosen = {n: seconds for n, seconds in kept.items() if n <= self.most}  # not of a larger machine
        self.number = given or next(iter(self.chosen), 0)
        self.is_open = is_free and measures and not self.chosen
        self._steps = threads_of_steps(self.most, self.chosen) if is_free and measures else None
        self._next = 0 if self._steps is None else next(self._steps)
        self._step, self._began = -1, 0.0

    def __str__(self) -> str:
        how = f"1 to {self.most} (measured in the first steps)" if self.is_open else str(self.number or self.most)
        return f"threads {how}"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Compute with these threads inside, and with torch's former number afterwards."""
        self.trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        try:
            set_threads(self.number)
            yield
        finally:
            set_threads(self.most)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        set_threads(self.number)  # Lightning shares the cores between the processes that it starts

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._steps is not None and trainer.global_step != self._step:  # a step may accumulate batches
            if not self.chosen:
                torch.set_num_threads(self._next)
            self._step, self._began = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._steps is None or trainer.global_step == self._step:
            return
        measured = not self.chosen
        self._next = self._steps.send(time.perf_counter() - self._began)
        if measured and self.chosen:
            self.number = self._next
            set_threads(self.number)
            means = ", ".join(f"{mean:.3g} s with {n}" for n, mean in sorted(self.chosen.items()))
            _logger.info("threads %d of %d: a step takes %s", self.number, self.most, means)
            trainer.should_stop = trainer.should_stop or self.stops

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.chosen:
            checkpoint["threads"] = {self.number: self.chosen[self.number]}
