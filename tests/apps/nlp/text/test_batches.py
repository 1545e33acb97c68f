"""Batches by a token budget: little padding, every pair once, as many batches in each epoch, and temperature."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from apps.data.loader import ResumableLoader, _Planned, _Sampler
from apps.nlp.text import batches as module
from apps.nlp.text.batches import TokenBatches, by_length, cut_by_tokens, evenly, quotas


def lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal, as sentences are, the target a fifth longer or shorter; specials are counted."""
    draw = np.random.default_rng(seed)
    source = np.maximum(3, np.exp(draw.normal(2.6, 0.4, count)).astype(np.int64) + 1)
    target = np.maximum(3, (source * np.exp(draw.normal(0.05, 0.2, count))).astype(np.int64) + 1)
    return source, target


def padding(source: np.ndarray, target: np.ndarray, batches: list[torch.Tensor]) -> float:
    full = sum(len(b) * int(side[b].max()) for b in batches for side in (source, target))
    return 1 - float(source.sum() + target.sum()) / full


def test_batches_are_cut_by_the_budget_from_neighbors_that_are_alike_and_spread():
    # 3 x 4 = 12 fit and 4 x 5 = 20 do not; 5 and 6: 2 x 6 = 12; 13 is a batch of its own, being over the budget
    longer = np.array([2, 3, 4, 5, 6, 13, 14])
    assert cut_by_tokens(longer, 12) == [0, 3, 5, 6, 7]
    assert cut_by_tokens(longer, 12, first=4) == [0, 1, 3, 5, 6, 7]  # 2 x 3 = 6 exceed 4; then 2 x 4 fit, 3 x 5 do not
    assert cut_by_tokens(np.array([5, 1, 1]), 10) == [0, 2, 3]  # in any order: 3 x 5 = 15
    assert [evenly(n) for n in (0, 1, 2, 4)] == [[], [0], [1, 0], [2, 0, 3, 1]]
    for n in (5, 8, 23):
        order = evenly(n)
        assert sorted(order) == list(range(n))
        assert order[0] == n // 2
        # Between the first four is a quarter of all.
        assert max(np.diff([*sorted(order[:4]), n])) <= -(-n // 4)
    source, target = np.array([5, 3, 4, 4, 1, 2]), np.array([1, 4, 2, 4, 5, 5])
    # a longer side of 4 (even): differences 2, 0, -1; of 5 (odd): -4, -3, 4
    order = by_length(source, target, np.arange(6))
    assert [(source[i], target[i]) for i in order] == [(4, 2), (4, 4), (3, 4), (1, 5), (2, 5), (5, 1)]


@pytest.mark.parametrize("budget", [1024, 4096])
def test_padding_is_under_a_twentieth_and_no_batch_over_its_budget(budget):
    source, target = lengths(30_000)
    plan = TokenBatches(source, target, budget)
    batches = plan.batches(0, 1)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(30_000))  # at temperature one each comes once
    assert padding(source, target, batches) < 0.05
    assert max(len(b) * max(source[b].max(), target[b].max()) for b in batches) <= budget
    assert plan.padding() == pytest.approx(padding(source, target, plan.batches(0, 0)), abs=1e-12)


@pytest.mark.parametrize("pool, temperature", [(1 << 17, 1.0), (200, 1.0), (200, 5.0)])
@pytest.mark.parametrize("count", [1, 2, 3, 50, 1000])
def test_every_epoch_has_as_many_batches(count, temperature, pool, monkeypatch):
    monkeypatch.setattr(module, "_POOL", pool)
    group = (np.arange(count) % 10 == 0).astype(np.int64)
    plan = TokenBatches(*lengths(count), 300, group, temperature)
    first = sum(len(b) for b in plan.batches(0, 0))
    for seed, epoch in itertools.product(range(3), range(3)):
        batches = plan.batches(seed, epoch)
        assert len(batches) == len(plan)
        assert min(len(b) for b in batches) > 0
        assert sum(len(b) for b in batches) == first


def test_batches_are_a_function_of_seed_and_epoch_as_many_as_foreseen():
    plan, again = (TokenBatches(*lengths(2000), 500) for _ in range(2))
    plan.batches(0, 7)
    first = plan.batches(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again.batches(0, 1), strict=True))
    own = {frozenset(b.tolist()) for b in first}
    for other in (plan.batches(0, 2), plan.batches(1, 1)):
        # other batches, not only another order of them
        assert len(own & {frozenset(b.tolist()) for b in other}) < len(first) / 4
    assert [len(b) for b in first] != sorted(len(b) for b in first)  # not from short to long
    # Sampling may bring more long pairs than were foreseen: then the budget is stretched, and no pair is lost.
    source = np.array([10] * 50 + [100])
    plan = TokenBatches(source, source, 100)
    assert len(plan) == 7  # 5 of ten pairs and the long one, and one for where the first cut falls
    plan._num_batches = 3
    batches = plan.batches(0, 0)
    assert len(batches) == 3
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(51))


def test_quotas_follow_the_temperature_and_small_groups_come_evenly():
    # 900^(1/2) : 100^(1/2) = 30 : 10
    assert quotas([900, 100], 2) == [750, 250]
    assert quotas([900, 100], 1) == [900, 100]
    assert quotas([900, 100], 1e9) == [500, 500]
    # shares 3/6, 2/6, 1/6 of 14 are 7, 4.67, 2.33: the largest remainder gets the one that is left
    assert quotas([9, 4, 1], 2) == [7, 5, 2]
    assert quotas([10_000, 1], 1) == [10_000, 1]
    assert sum(quotas([7, 3, 3, 1], 3)) == 14
    group = np.array([0] * 900 + [1] * 100)
    plan = TokenBatches(*lengths(1000), 300, group, temperature=2)
    seen = Counter()
    for epoch in range(6):
        positions = torch.cat(plan.batches(0, epoch)).numpy()
        assert Counter(group[positions].tolist()) == {0: 750, 1: 250}
        seen.update(positions.tolist())
        # pairs of a group have come equally often, or once more: 1 or 2 after the first epoch, 250/100
        for members in (np.flatnonzero(group == g) for g in (0, 1)):
            counts = [seen[i] for i in members]
            assert max(counts) - min(counts) <= 1
    assert {seen[i] for i in range(900)} == {5}  # 6 x 750 / 900
    assert {seen[i] for i in range(900, 1000)} == {15}


class Numbers:
    def __len__(self):
        return 1000

    def __getitems__(self, positions):
        return positions.clone()


def loader(seed=1, **options):
    plan = TokenBatches(*lengths(1000), 500)
    return ResumableLoader(Numbers(), plan=plan, seed=seed, collate_fn=_same, draws=False, **options)


def _same(batch):
    return batch


def epoch(loader, number):
    loader.batch_sampler.sampler.set_epoch(number)
    return [b.tolist() for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_mid_epoch_a_planned_loader_serves_the_rest(workers):
    whole = epoch(loader(), 2)
    assert len(whole) == len(loader())
    stopped = loader()
    stopped.batch_sampler.sampler.set_epoch(2)
    for _ in itertools.islice(stopped, 5):
        pass
    resumed = loader(seed=99, num_workers=workers)  # the checkpoint's seed counts
    resumed.load_state_dict(stopped.state_dict())
    assert epoch(resumed, 2) == whole[5:]
    if not workers:
        assert epoch(resumed, 3) == epoch(loader(), 3) != whole
        fixed = loader(shuffle=False)  # every epoch is the first
        assert epoch(fixed, 3) == epoch(fixed, 0) == epoch(loader(), 0)


@pytest.mark.parametrize("processes", [3, 200])
def test_processes_share_an_epoch_and_make_as_many_steps(processes):
    plan = TokenBatches(*lengths(1000), 500)
    parts = []
    for rank in range(processes):
        sampler = _Sampler(range(1000), num_replicas=processes, rank=rank, shuffle=True, seed=0)
        sampler.set_epoch(4)
        part = _Planned(sampler, plan)
        parts.append(list(part.epoch(0, 0)))
        assert len(parts[-1]) == len(part) == -(-len(plan) // processes)
        assert [b.tolist() for b in part.epoch(0, 1)] == [b.tolist() for b in parts[-1][1:]]
    served = Counter(tuple(b.tolist()) for part in parts for b in part)
    assert set(served) == {tuple(b.tolist()) for b in plan.batches(0, 4)}
    assert max(served.values()) - min(served.values()) <= 1


def test_a_loader_has_a_batch_size_or_a_plan_of_some_pairs():
    plan = TokenBatches(*lengths(10), 500)
    for options in ({}, {"batch_size": 2, "plan": plan}, {"plan": plan, "drop_last": True}):
        with pytest.raises(ValueError, match="a loader has batches of batch_size examples, or those of a plan"):
            ResumableLoader(Numbers(), **options)
    with pytest.raises(ValueError, match="there are no sentence pairs to train on"):
        TokenBatches(*lengths(0), 9)
