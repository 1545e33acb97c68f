"""Inputs of several requests are answered together, by one thread that owns the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Broken(RuntimeError):
    """The model cannot answer any more; whoever waits for it has to ask another process."""


@dataclass(eq=False)
class _Request:
    """The inputs of one request: its answer is whole when ``left`` of them is 0."""

    outputs: list[Any]
    left: int
    answer: Future[list[Any]] = field(default_factory=Future)


class _Waiting(NamedTuple):
    """An input that waits, with its place in its request and the time when it came."""

    request: _Request
    place: int
    value: Any
    since: float


class Batcher:
    """Joins the inputs of requests to batches, and answers them on its own thread.

    A batch is computed when it is full, or when its oldest input has waited for ``wait`` seconds. If a batch fails,
    each of its inputs is tried by itself, so that a request never fails for another one's input.

    Args:
        predict: answers several inputs, in their order.
        most: maximum number of inputs per batch.
        wait: maximum number of seconds that an input waits for others.
        is_fatal: tells whether nothing can be computed after an error, such as one of a GPU.
        on_broken: called on the thread after such an error, or an exception that is no ``Exception`` at all.
        watch: called after each batch with its size and the seconds that it took.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Any]], Sequence[Any]],
        most: int,
        wait: float,
        *,
        is_fatal: Callable[[Exception], bool] = lambda error: False,
        on_broken: Callable[[], None] = lambda: None,
        watch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._predict, self._most, self._wait = predict, most, wait
        self._is_fatal, self._on_broken, self._watch = is_fatal, on_broken, watch
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.broken = False
        # A daemon: a second interrupt ends the process even while a batch is computed.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def __len__(self) -> int:
        """The number of inputs that wait."""
        return len(self._queue)

    def submit(self, inputs: Sequence[Any]) -> Future[list[Any]]:
        """Take the inputs of a request, and return what will be its answers, in their order.

        Its exception is the first failing input's, or ``Broken``.

        Raises:
            Broken: the model cannot answer any more, or the batcher has been stopped.
        """
        request = _Request([None] * len(inputs), len(inputs))
        request.answer.set_running_or_notify_cancel()  # from now on nobody can cancel it
        with self._changed:
            if self.broken or self._stopping:
                raise Broken("the model is not at work any more")
            now = time.monotonic()
            self._queue.extend(_Waiting(request, place, value, now) for place, value in enumerate(inputs))
            self._changed.notify()
        return request.answer

    def abandon(self, answer: Future[list[Any]]) -> None:
        """Leave out the inputs of a request that still wait: nobody reads their answer any more."""
        with self._changed:
            self._queue = deque(waiting for waiting in self._queue if waiting.request.answer is not answer)

    def _run(self) -> None:
        batch: list[_Waiting] = []
        try:
            while batch := self._next():
                begin = time.perf_counter()
                self._answer(batch)
                self._watch(len(batch), time.perf_counter() - begin)
        except BaseException:  # whatever it is, nobody may wait for an answer that does not come
            log.exception("the model has broken down")
            with self._changed:
                self.broken = True
                batch += self._queue
                self._queue.clear()
            for request in {waiting.request for waiting in batch}:
                if not request.answer.done():
                    request.answer.set_exception(Broken("the model has broken down"))
            self._on_broken()

    def _next(self) -> list[_Waiting]:
        """Return the next batch, as soon as there is one; an empty one after ``stop``."""
        batch: list[_Waiting] = []
        with self._changed:
            while not batch:
                while not self._queue:
                    if self._stopping:
                        return []
                    self._changed.wait()
                self._gather()
                while self._queue and len(batch) < self._most:
                    waiting = self._queue.popleft()
                    if not waiting.request.answer.done():  # else another input of its request has failed
                        batch.append(waiting)
        return batch

    def _gather(self) -> None:
        """Wait until a batch is full, or its first input has waited long enough."""
        until = self._queue[0].since + self._wait
        while len(self._queue) < self._most and not self._stopping:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            outputs = self._predict([waiting.value for waiting in batch])
            if len(outputs) != len(batch):
                raise RuntimeError(f"the model gave {len(outputs)} answers to {len(batch)} inputs")
        except Exception as error:
            if self._is_fatal(error):
                raise
            if len(batch) > 1:
                for waiting in batch:
                    self._answer([waiting])
                return
            log.exception("an input failed")
            if not batch[0].request.answer.done():
                batch[0].request.answer.set_exception(error)
            return
        for waiting, output in zip(batch, outputs, strict=True):
            request = waiting.request
            request.outputs[waiting.place] = output
            request.left -= 1
            if not request.left and not request.answer.done():
                request.answer.set_result(request.outputs)
