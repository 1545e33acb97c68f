"""The weights of a final run: those that validate best."""

from __future__ import annotations

import pytest
import torch

from apps.runner.runner import Budget
from apps.verdict import training
from apps.verdict.training import Best, Evaluated


@pytest.mark.parametrize(("higher_is_better", "kept"), [(True, 6), (False, 14)])
def test_the_weights_that_validate_best_stay(higher_is_better, kept, monkeypatch):
    qualities = dict(zip(range(2, 18, 2), (0.3, 0.4, 0.9, 0.9, 0.5, 0.4, 0.1, 0.2), strict=True))  # of 16 steps
    model, asked = torch.nn.Linear(1, 1, bias=False), []

    def by_example(model, trainer, batches, budget):
        assert list(batches) == ["batch"]
        asked.append(int(model.weight))
        return Evaluated("q", torch.tensor([qualities[asked[-1]]]).numpy(), higher_is_better)

    monkeypatch.setattr(training, "_by_example", by_example)
    best = Best(model, lambda: ["batch"], 16, Budget())
    for step in range(1, 17):
        torch.nn.init.constant_(model.weight, step)
        best.check(step, None)
        best.check(step, None)  # a step of several batches
    assert asked == list(qualities)
    best.restore()
    assert model.weight.item() == kept
