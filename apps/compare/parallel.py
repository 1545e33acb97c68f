"""Several units are trained at a time, each in a process of its own.

Small models use the cores better so: a step of a millisecond is not worth sharing between cores.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from apps.base.progress import hidden
from apps.base.quiet import quiet
from apps.compare.experiment import Experiment
from apps.compare.training import Unit, train


def worker_context(modules: Sequence[str] = ()) -> BaseContext:
    """Return the way to start worker processes, with ``modules`` imported once for all of them.

    A plain fork would wait for torch's threads, which are not in the child.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    return context


def start(context: BaseContext, target: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """Start a process that runs ``target(pipe, *args)``, and return it with the other end of its pipe."""
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return process, ours


@contextmanager
def answering(pipe: Connection) -> Iterator[None]:
    """Send an exception that is raised inside, in a worker, to the parent as ("error", exception)."""
    try:
        with hidden(), quiet(own_notes=False), suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
            yield
    except Exception as error:
        with suppress(OSError):
            try:
                pipe.send(("error", error))
            except Exception:  # an exception that does not pickle
                pipe.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))


def train_all(
    arguments: Sequence[str],
    units: Sequence[Unit],
    output: Path,
    jobs: int,
    modules: Sequence[str],
    progress: Callable[[Unit, int, int, Mapping[str, float]], None],
    finished: Callable[[Unit, dict[str, Any]], None],
) -> None:
    """Do ``units``, ``jobs`` at a time, each worker with its part of this process's threads.

    Args:
        arguments: arguments of the ``Experiment``.
        units: units in the order in which they are begun.
        output: folder of the comparison.
        jobs: number of worker processes.
        modules: modules to import once for all workers.
        progress: is called with a unit, its steps done and to do, and the use of its experts.
        finished: is called with a unit and its result as soon as it ends.

    Raises:
        RuntimeError: a worker died.
        Exception: a worker's error, as ``train`` raises it; the other workers are stopped and can go on later.
    """
    context, waiting = worker_context(modules), list(units)
    threads = max(1, torch.get_num_threads() // jobs)
    workers: dict[Connection, Any] = {}
    at_work: dict[Connection, Unit] = {}
    try:
        for _ in range(min(jobs, len(waiting))):
            process, pipe = start(context, _work, tuple(arguments), output, threads)
            workers[pipe], at_work[pipe] = process, waiting.pop(0)
            pipe.send(at_work[pipe])
        while at_work:
            for pipe in [p for p in wait(list(at_work)) if isinstance(p, Connection)]:
                unit = at_work[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    raise RuntimeError(f"the process at {unit.name} ended without a result (out of memory?)") from None
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
    finally:
        for pipe, process in workers.items():
            pipe.close()
            process.kill()  # at any moment: files are written whole or not at all
            process.join()


def _work(pipe: Connection, arguments: tuple[str, ...], output: Path, threads: int) -> None:
    with answering(pipe):
        torch.set_num_threads(threads)
        experiment = Experiment(arguments)
        last = 0.0

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal last
            if time.monotonic() - last > 0.25:
                last = time.monotonic()
                pipe.send(("progress", (done, total, figures)))

        while True:
            pipe.send(("done", train(experiment, pipe.recv(), output, progress)))
