"""ResumableLoader: batch b of epoch e depends on (seed, e, b) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_app import NoisyPoints
from torch.utils.data.distributed import DistributedSampler

from apps.data.loader import ResumableLoader, _Sampler, in_order, seeded


def started(loader: ResumableLoader, epoch: int) -> ResumableLoader:
    loader.batch_sampler.sampler.set_epoch(epoch)  # what Lightning does
    return loader


def batches(loader: ResumableLoader, epoch: int = 0) -> list[torch.Tensor]:
    return [point for point, _ in started(loader, epoch)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def points() -> NoisyPoints:
    return NoisyPoints(n=10, num_classes=2)


def test_an_epoch_depends_on_its_number_and_the_seed_alone_with_any_number_of_workers(points):
    state = torch.get_rng_state()
    expected = batches(ResumableLoader(points, 4, seed=1), epoch=3)
    assert [len(b) for b in expected] == [4, 4, 2]
    assert torch.equal(state, torch.get_rng_state())  # the model's generator is left alone
    torch.randn(7)
    assert same(expected, batches(ResumableLoader(points, 4, seed=1), epoch=3))
    assert same(expected, batches(ResumableLoader(points, 4, seed=1, num_workers=2), epoch=3))
    loader = ResumableLoader(points, 4, seed=1)
    first, second = batches(loader, 0), batches(loader, 1)
    assert not same(first, second)
    # A seed of 0 in epoch 1 must not be a seed of 1 in epoch 0, as it is with DistributedSampler's seed + epoch.
    assert not same(first, batches(ResumableLoader(points, 4, seed=0), 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_mid_epoch_it_serves_the_rest_and_then_whole_epochs(points, workers):
    whole = batches(ResumableLoader(points, 4, seed=1), epoch=2)
    stopped = started(ResumableLoader(points, 4, seed=1), 2)
    next(iter(stopped))
    state = stopped.state_dict()
    assert state == {"epoch": 2, "served": 1, "seed": 1}
    resumed = ResumableLoader(points, 4, seed=99, num_workers=workers)  # the checkpoint's seed counts
    resumed.load_state_dict(state)
    assert same(whole[1:], batches(resumed, epoch=2))
    assert same(batches(ResumableLoader(points, 4, seed=1), 3), batches(resumed, epoch=3))


def test_workers_that_persist_forget_an_epoch_that_was_cut_and_resume_another(points):
    expected = [batches(ResumableLoader(points, 4, seed=1), epoch) for epoch in range(3)]
    loader = ResumableLoader(points, 4, seed=1, num_workers=2, persistent_workers=True)
    iterator = iter(started(loader, 0))
    assert torch.equal(next(iterator)[0], expected[0][0])  # the workers have read further than this
    assert loader.state_dict()["served"] == 1
    assert same(expected[1], batches(loader, 1))
    loader.load_state_dict({"epoch": 2, "served": 2, "seed": 1})
    assert same(expected[2][2:], batches(loader, 2))
    assert same(expected[0], batches(loader, 0))


class ByBatch:
    """Positions, as a tensor where no random numbers are drawn."""

    def __len__(self):
        return 10

    def __getitems__(self, positions):
        assert isinstance(positions, torch.Tensor)
        return positions.clone()


def test_without_draws_it_serves_the_same_order_and_resumes_too():
    def loader(workers=0):
        return ResumableLoader(ByBatch(), 4, seed=1, collate_fn=lambda x: x, draws=False, num_workers=workers)

    def epoch(loader, number=2):
        return [b.tolist() for b in started(loader, number)]

    whole = epoch(ResumableLoader(list(range(10)), 4, seed=1))
    random_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert epoch(loader()) == whole
    assert random.getstate() == random_state
    assert np.random.get_state()[1].tolist() == numpy_state
    stopped, resumed = started(loader(), 2), loader(workers=2)
    next(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    assert epoch(resumed) == whole[1:]
    # A dataset without __getitems__ is read example by example.
    assert epoch(ResumableLoader(list(range(10)), 4, seed=1, draws=False)) == whole


@pytest.mark.parametrize(("size", "processes"), [(10, 1), (10, 3), (2, 5), (9, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_sampler_s_order_is_that_of_distributed_sampler(size, processes, shuffle):
    for rank in range(processes):
        options = {"num_replicas": processes, "rank": rank, "shuffle": shuffle, "seed": 3}
        expected, ours = DistributedSampler(range(size), **options), _Sampler(range(size), **options)
        for epoch in (0, 4):
            expected.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert ours.order().tolist() == list(ours) == list(expected)
    loader = ResumableLoader(list(range(5)), 2, seed=0, shuffle=False, drop_last=True)
    assert [b.tolist() for b in loader] == [[0, 1], [2, 3]]
    assert len(loader) == 2


def test_seeded_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(5):
        inside = torch.rand(1)
    with seeded(5):
        assert torch.equal(inside, torch.rand(1))
    assert torch.equal(expected, torch.cat((first, torch.rand(1))))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (3, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (0, {"batch_size": 1}, "empty"),
        (3, {"batch_size": 4, "drop_last": True}, "batch_size=4 exceeds the 3 training examples"),
    ],
)
def test_impossible_batches_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(list(range(size)), **options)


def test_an_evaluation_reads_all_in_order_and_leaves_the_generator_as_it_was():
    class Stacked:
        """Whole batches of the numbers below 5."""

        def __len__(self) -> int:
            return 5

        def __getitems__(self, places: list[int]) -> torch.Tensor:
            return torch.tensor(places)

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        assert [b.tolist() for b in in_order(Stacked(), 2, workers)] == [[0, 1], [2, 3], [4]]
    assert list(in_order([3, 1, 2], 2, collate_fn=sum)) == [4, 2]
    assert torch.equal(torch.random.get_rng_state(), before)
