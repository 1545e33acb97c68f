"""A DataLoader that resumes exactly: batch b of epoch e is a function of (seed, e, b), and of nothing else.

Lightning saves no sampler position, so a run resumed in mid-epoch would see the first batches of the epoch twice and
never the last ones. Here the order of an epoch is seeded by its number, the position is counted and saved, and the
random transforms of a batch are seeded by the batch, whatever the number of workers and the model's use of random
numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

# DistributedSampler seeds an epoch with seed + epoch: neighboring seeds would share all their orders but one.
_SEED_STRIDE = 1_000_003


class BatchPlan(Protocol):
    """Batches of other sizes than one fixed number of examples, such as batches of a token budget."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same in every epoch."""

    def batches(self, seed: int, epoch: int) -> Sequence[torch.Tensor]:
        """Return each batch's positions in the dataset, int64; a function of only these two numbers."""


class ResumableLoader(DataLoader):
    """Batches of a map-style dataset, in an order and with random numbers that a resumed run repeats.

    Args:
        dataset: map-style dataset that may use the global generators of torch, numpy and ``random``.
        batch_size: examples a batch and process; None with ``plan``.
        seed: seed of the order and of the transforms; None takes the one given to ``torch.manual_seed``.
        shuffle: use a new random order each epoch; False keeps the dataset's.
        drop_last: leave out a last batch that is not full.
        collate_fn: makes a batch of a list of examples; it may use random numbers as well (mixup).
        draws: whether the dataset or collate_fn use random numbers. False spares a batch its seeding, which takes as
            long as reading a batch of a table; ``dataset.__getitems__`` is then given an int64 tensor of positions.
        plan: batches instead of ``batch_size`` and ``drop_last``. Processes take them in turn; the first ones are
            repeated until each process has as many. Without ``shuffle`` every epoch is the plan's epoch 0.
        loader_kwargs: ``num_workers``, ``pin_memory``, ``persistent_workers`` ... of ``DataLoader``.

    Raises:
        ValueError: batch_size below 1, an empty dataset, no full batch with ``drop_last``, or both or neither of
            batch_size and plan.

    Example::

        ResumableLoader(dataset, batch_size=64, num_workers=2)
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        draws: bool = True,
        plan: BatchPlan | None = None,
        **loader_kwargs: Any,
    ) -> None:
        if (batch_size is None) == (plan is None) or (plan is not None and drop_last):
            raise ValueError("a loader has batches of batch_size examples, or those of a plan, which drops none")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        size = len(dataset)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError("the training dataset is empty")
        if batch_size is not None and drop_last and size < batch_size:
            raise ValueError(f"batch_size={batch_size} exceeds the {size} training examples; drop_last drops them all")
        seed = torch.initial_seed() % 2**31 if seed is None else seed
        distributed = dist.is_available() and dist.is_initialized()
        # Lightning leaves a DistributedSampler as it is, also on one process, and sets its epoch.
        sampler = _Sampler(
            dataset,
            num_replicas=dist.get_world_size() if distributed else 1,
            rank=dist.get_rank() if distributed else 0,
            shuffle=shuffle,
            seed=seed * _SEED_STRIDE,
        )
        parts = _Blocks(sampler, batch_size or 1, drop_last) if plan is None else _Planned(sampler, plan)
        self._batches = _Batches(sampler, parts, seed, draws)
        super().__init__(
            _SeededDataset(dataset, collate_fn or torch.utils.data.default_collate),
            batch_sampler=self._batches,  # type: ignore[arg-type]  # a batch may be a tensor
            collate_fn=as_it_is,
            worker_init_fn=ignore_interrupt,
            # The base seed of an epoch's workers must not move the model's generator.
            generator=torch.Generator().manual_seed(seed),
            **loader_kwargs,
        )
        if distributed:
            # Lightning looks only here for a distributed sampler, and rebuilds the loader without one.
            object.__setattr__(self, "sampler", sampler)
        self.served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts at its first batch, after Lightning has set the sampler's epoch.
        self.served = self._batches.start()
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches that were served, and the seed."""
        return {"epoch": self._batches.sampler.epoch, "served": self.served, "seed": self._batches.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass over the saved epoch after the batches that were served."""
        self._batches.seed = state["seed"]
        self._batches.sampler.seed = state["seed"] * _SEED_STRIDE
        self._batches.resume = (state["epoch"], state["served"])
        self.served = state["served"]


class _Draw(list):
    """The indices of one batch and the seed of its random transforms."""

    seed: int


class _Sampler(DistributedSampler[Any]):
    """A DistributedSampler whose epoch is a tensor: as a list, ten million positions take 400 MB."""

    def order(self) -> torch.Tensor:
        """Return the positions of the epoch in this process's order, int64 (num_samples,)."""
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        else:
            order = torch.arange(size)
        # The first positions are repeated until each process has as many.
        order = order.repeat(-(-self.total_size // size))[: self.total_size] if size < self.total_size else order
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())


class _Blocks:
    """The sampler's epoch cut into batches of one size."""

    def __init__(self, sampler: _Sampler, batch_size: int, drop_last: bool) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __len__(self) -> int:
        n = len(self.sampler)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def epoch(self, seed: int, start: int) -> Iterator[torch.Tensor]:
        """Return the batches from number ``start`` on; the sampler has the seed already."""
        order = self.sampler.order()
        return (order[b * self.batch_size : (b + 1) * self.batch_size] for b in range(start, len(self)))


class _Planned:
    """This process's part of the epochs of a plan."""

    def __init__(self, sampler: _Sampler, plan: BatchPlan) -> None:
        self.sampler, self.plan = sampler, plan

    def __len__(self) -> int:
        return -(-len(self.plan) // self.sampler.num_replicas)

    def epoch(self, seed: int, start: int) -> Iterator[torch.Tensor]:
        """Return the batches from number ``start`` on."""
        sampler = self.sampler
        batches = self.plan.batches(seed, sampler.epoch if sampler.shuffle else 0)
        places = range(sampler.rank, len(self) * sampler.num_replicas, sampler.num_replicas)
        return (batches[place % len(batches)] for place in places[start:])


class _Batches:
    """The batches of the sampler's epoch, each with its own seed if random numbers are used."""

    def __init__(self, sampler: _Sampler, parts: _Blocks | _Planned, seed: int, draws: bool) -> None:
        self.sampler, self.parts, self.seed, self.draws = sampler, parts, seed, draws
        self.resume = (-1, 0)

    def start(self) -> int:
        """Return the number of the first batch to serve in the sampler's epoch."""
        epoch, served = self.resume
        return served if epoch == self.sampler.epoch else 0

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[_Draw | torch.Tensor]:
        start, epoch = self.start(), self.sampler.epoch
        self.resume = (-1, 0)
        for b, positions in enumerate(self.parts.epoch(self.seed, start), start):
            if not self.draws:
                yield positions
                continue
            draw = _Draw(positions.tolist())
            draw.seed = int(np.random.SeedSequence([self.seed, epoch, b, self.sampler.rank]).generate_state(1)[0])
            yield draw


class _SeededDataset(Dataset):
    """Reads ``source`` by whole batches, and loads and collates each under its own seed."""

    def __init__(self, source: Dataset, collate: Callable[[list[Any]], Any]) -> None:
        self.source, self.collate = source, collate

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.source[index]

    def __getitems__(self, draw: _Draw | torch.Tensor) -> Any:
        fetch = getattr(self.source, "__getitems__", None)
        if not isinstance(draw, _Draw):
            return self.collate(fetch(draw) if fetch else [self.source[i] for i in draw.tolist()])
        with seeded(draw.seed):
            return self.collate(fetch(list(draw)) if fetch else [self.source[i] for i in draw])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the CPU generators of torch, numpy and ``random`` from ``seed`` inside, and restore them afterwards."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def batches_of_test(trainer: Any) -> Iterator[Any]:
    """Return the batches of the test in progress once more, within the trainer's limit."""
    loader = trainer.test_dataloaders
    loader = loader[0] if isinstance(loader, (list, tuple)) else loader
    return itertools.islice(loader, int(min(trainer.num_test_batches[0], len(loader))))


def in_order(
    dataset: Any, batch_size: int, num_workers: int = 0, collate_fn: Callable[[Any], Any] | None = None
) -> DataLoader[Any]:
    """Return a loader for an evaluation, which reads every example once, in the dataset's order.

    It is a plain DataLoader, to which Lightning gives the sampler of a distributed or a predicting run. Without
    ``collate_fn`` the dataset's ``__getitems__`` makes the batches.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn or as_it_is,
        num_workers=num_workers,
        worker_init_fn=ignore_interrupt,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # starting a pass must not move the model's generator
    )


def ignore_interrupt(worker: int) -> None:
    """Let a worker process ignore Ctrl-C, which the terminal also sends to it: a training ends after its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """Return a batch that the dataset has made already; unlike a lambda, it can be sent to worker processes."""
    return batch
