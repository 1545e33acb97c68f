"""Speed and memory of each system, in a process of its own.

A worker process holds one trained system and does rounds on command. The parent asks the workers in turn, so a machine
that slows down slows all of them alike, and medians are taken over the rounds.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import move_data_to_device

from apps.base.messages import first_line
from apps.compare.experiment import Experiment
from apps.compare.systems import shared
from apps.equal_cost.own_model import OwnModel
from apps.runner.workers import answer, answering, workers
from apps.train.cost.flops import measure_cost, num_examples
from apps.train.cost.footprint import used_memory

ROUND_SECONDS = 0.3
"""Least duration of a round, which is one step or more."""


@dataclass(frozen=True)
class Job:
    """The task of a worker.

    Attributes:
        arguments: arguments of the ``Experiment``.
        system: name of the system.
        checkpoint: path of its trained weights; None: it is measured as initialized.
        threads: number of torch's threads on the CPU.
    """

    arguments: tuple[str, ...]
    system: str
    checkpoint: str | None
    threads: int


def measure(
    jobs: Mapping[str, Job],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    modules: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Measure throughput and peak memory of each system, the systems taking turns.

    Args:
        jobs: tasks by system, each for a worker of its own.
        rounds: timed rounds a system, of training and of inference; one more, untimed, comes first.
        progress: is called with the rounds done and to do.
        modules: modules to import once for all workers.

    Returns:
        By system: ``train_examples_per_second`` and ``inference_examples_per_second`` (medians), the rounds they are
        the medians of, ``seconds_per_step`` of the optimizer, ``peak_memory_bytes`` while training with
        ``base_memory_bytes`` before the model was built, and ``cost`` with the trained weights.

    Raises:
        RuntimeError: a worker failed; the message is its error.
    """
    total, done = 2 * (rounds + 1) * len(jobs), 0
    with workers(_work, [(job,) for job in jobs.values()], modules) as of_jobs:
        pipes = dict(zip(jobs, of_jobs, strict=True))
        measured = {name: _answer(name, pipe) for name, pipe in pipes.items()}
        for phase in ("train", "inference"):
            rates: dict[str, list[float]] = {name: [] for name in jobs}
            for number in range(rounds + 1):
                for name, pipe in pipes.items():
                    rate = _answer(name, pipe, phase)
                    if number:
                        rates[name].append(rate)
                    done += 1
                    progress(done, total)
            for name, pipe in pipes.items():
                own, rate = measured[name], statistics.median(rates[name])
                own |= {f"{phase}_rounds": rates[name], f"{phase}_examples_per_second": rate}
                if phase == "train":
                    own |= {"peak_memory_bytes": _answer(name, pipe, "memory")}
                    own |= {"seconds_per_step": own["examples_per_step"] / rate}
        return measured


def _answer(name: str, pipe: Connection, command: str = "") -> Any:
    """Return a worker's answer to a command; without one, its description of itself."""
    if command:
        pipe.send(command)
    kind, value = answer(pipe, f"measures {name}")
    if kind == "error":
        raise RuntimeError(f"measuring {name} failed: {type(value).__name__}: {first_line(value)}")
    return value


def _work(pipe: Connection, job: Job) -> None:
    """Build the system, then do one round for each command."""
    with answering(pipe, job.threads):
        bench = _Bench(job)
        pipe.send(("done", bench.facts))
        while True:
            pipe.send(("done", getattr(bench, pipe.recv())()))


class _Bench:
    """One system on its device with a few batches, ready for rounds."""

    def __init__(self, job: Job) -> None:
        experiment = Experiment(job.arguments)
        trainer = experiment.trainer()
        self.device, self.precision = trainer.strategy.root_device, trainer.precision_plugin
        seed_everything(experiment.seed, verbose=False)
        data = experiment.data()
        data.prepare_data()
        data.setup("fit")
        data.trainer = trainer
        batches = [*itertools.islice(data.train_dataloader(), 8), next(iter(data.val_dataloader()))]
        moved = move_data_to_device([data.on_before_batch_transfer(batch, 0) for batch in batches], self.device)
        moved = [data.on_after_batch_transfer(batch, 0) for batch in moved]
        *self.train_batches, self.eval_batch = moved
        _release()
        base = used_memory(self.device, peak=False)
        self.model: Any = experiment.module(job.system)
        module = self.model.module
        if job.checkpoint is not None:
            state = torch.load(job.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            module.load_state_dict({k: v for k, v in state.items() if k in module.state_dict()})
            del state
        self.module: Any = self.precision.convert_module(module.to(self.device))
        own = isinstance(self.model, OwnModel)
        self.optimizer = _optimizer(self.model, *((experiment.still(data),) if own else ()))
        self.facts: dict[str, Any] = {"base_memory_bytes": base}
        replaced = shared(module, experiment.replaced)
        with self.precision.forward_context():
            self.facts["cost"] = asdict(measure_cost(self.model, self.eval_batch, replaced, as_evaluated=True))
        counts = [num_examples(self.model.example_inputs(b)) for b in self.train_batches]
        # Batches of a token budget differ in their number of examples: a round takes all of them.
        self.cycle = 1 if len(set(counts)) == 1 else len(counts)
        self.batches = itertools.cycle(self.train_batches)
        accumulated = int(experiment.trainer_options.get("accumulate_grad_batches") or 1)
        self.facts["examples_per_step"] = accumulated * statistics.mean(counts)
        # The peak starts here, without the sparse model that made a baseline, the checkpoint and the counted forward.
        _release()
        _reset_peak(self.device)

    def train(self) -> float:
        """Return the examples per second of forward, backward and optimizer step."""
        self.module.train()
        return self._round(self._train_step, self.cycle)

    def _train_step(self) -> int:
        batch = next(self.batches)
        with self.precision.forward_context():
            loss = self.model.training_loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.optimizer.step()
        return int(loss.out.num_examples)

    @torch.no_grad()
    def inference(self) -> float:
        """Return the examples per second of only the forward, in evaluation mode."""
        self.module.eval()
        return self._round(self._infer)

    def _infer(self) -> int:
        inputs = self.model.example_inputs(self.eval_batch)
        with self.precision.forward_context():
            self.model(*inputs)
        return num_examples(inputs)

    def memory(self) -> int:
        """Return the peak bytes since the set-up."""
        return used_memory(self.device, peak=True)

    def _round(self, step: Callable[[], int], times: int = 1) -> float:
        examples, began = 0, time.perf_counter()
        while True:
            for _ in range(times):
                examples += step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - began
            if seconds >= ROUND_SECONDS:
                return examples / seconds


def _optimizer(model: Any, *trainer: Trainer) -> torch.optim.Optimizer:
    """Return the model's optimizer without its schedule; a user's own module gets a trainer to ask."""
    configured: Any = model.configure_optimizers(*trainer)
    while isinstance(configured, (list, tuple)) and configured:  # optimizers, or these and schedulers
        configured = configured[0]
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(model.module).__name__
        raise ValueError(f"configure_optimizers of {kind} gives {type(optimizer).__name__}, not one")
    return optimizer


def _release() -> None:
    """Collect garbage and give freed memory back to the system, so that it is not counted as used."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
