"""Several units are done at a time, each in a separate process.

Small models use the cores better so: a step of a millisecond is not worth sharing between cores.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from apps.base.machine import set_threads
from apps.base.progress import hidden
from apps.base.quiet import quiet

Progress = Callable[[int, int, Mapping[str, float]], None]
"""A function of the steps done and to do, and of figures such as the use of the experts, as bars show it."""

_SHOWN_EVERY = 0.25


def unseen(done: int, total: int, figures: Mapping[str, float]) -> None:
    """Show no progress."""


@contextmanager
def workers(target: Callable[..., None], jobs: Iterable[Sequence[Any]], modules: Sequence[str]) -> Iterator[list[Any]]:
    """Start a process for each job, and kill those that are left in the end; files are written whole or not at all.

    Args:
        target: runs in a process, with the process's end of a pipe and the values of a job.
        jobs: the jobs.
        modules: modules to import once for all processes.

    Yields:
        The other ends of their pipes.
    """
    context = _context(modules)
    started: list[tuple[Any, Connection]] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            started.append((context.Process(target=target, args=(theirs, *job), daemon=True), ours))
            started[-1][0].start()
            theirs.close()
        yield [pipe for _, pipe in started]
    finally:
        for process, pipe in started:
            pipe.close()
            process.kill()
            process.join()


def _context(modules: Sequence[str]) -> Any:
    """Return the way to start processes: a plain fork would wait for torch's threads, which are not in the child."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    return context


@contextmanager
def answering(pipe: Connection, threads: int) -> Iterator[None]:
    """Compute with this many threads, and send an exception from inside to the parent as ("error", exception)."""
    try:
        with hidden(), quiet(own_notes=False), suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
            set_threads(threads)
            yield
    except Exception as error:
        with suppress(OSError):
            try:
                pipe.send(("error", error))
            except Exception:  # an exception that does not pickle
                pipe.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))


def answer(pipe: Any, what: str) -> tuple[str, Any]:
    """Return the kind and the value of a worker's next message.

    Args:
        pipe: the end of its pipe.
        what: its work, such as "is at sparse", for the message.

    Raises:
        RuntimeError: the worker died.
    """
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        raise RuntimeError(f"the process that {what} ended without a result (out of memory?)") from None
    return kind, value


def do_all(
    make: Callable[[], Callable[[Any, Progress], Any]],
    units: Sequence[Any],
    jobs: int,
    modules: Sequence[str],
    progress: Callable[..., None],
    finished: Callable[[Any, Any], None],
) -> None:
    """Do ``units``, ``jobs`` at a time, each worker with its part of this process's threads.

    Args:
        make: is called once in each worker and returns what does a unit and shows its progress.
        units: units in the order in which they are begun.
        jobs: number of worker processes.
        modules: modules to import once for all workers.
        progress: is called with a unit and what a ``Progress`` takes.
        finished: is called with a unit and its result as soon as it ends.

    Raises:
        RuntimeError: a worker died.
        Exception: a worker's error, as the unit raises it; the other workers are stopped and can continue later.
    """
    waiting, threads = list(units), max(1, torch.get_num_threads() // jobs)
    with workers(_work, [(make, threads)] * min(jobs, len(waiting)), modules) as pipes:
        at_work: dict[Any, Any] = {pipe: waiting.pop(0) for pipe in pipes}
        for pipe, unit in at_work.items():
            pipe.send(unit)
        while at_work:
            for pipe in cast("list[Connection]", wait(list(at_work))):
                unit = at_work[pipe]
                kind, value = answer(pipe, f"is at {unit.name}")
                if kind == "progress":
                    progress(unit, *value)
                    continue
                if kind == "error":
                    raise value
                del at_work[pipe]
                finished(unit, value)
                if waiting:
                    at_work[pipe] = waiting.pop(0)
                    pipe.send(at_work[pipe])


def _work(pipe: Connection, make: Callable[[], Callable[[Any, Progress], Any]], threads: int) -> None:
    with answering(pipe, threads):
        work, last = make(), 0.0

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal last
            if time.monotonic() - last > _SHOWN_EVERY:
                last = time.monotonic()
                pipe.send(("progress", (done, total, figures)))

        while True:
            pipe.send(("done", work(pipe.recv(), progress)))
