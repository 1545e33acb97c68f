"""A compiled training compiles each shape once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Callback
from own_net import Net
from tiny_app import TinyData, TinyModule
from torch import nn
from torch._dynamo.testing import CompileCounter
from trainings import MOE, fit

import core
from apps.train.module import TaskOutput
from apps.train.sparsified import SparsifyConfig, sparsified

LAYERS = core.MoEConfig(4, core.TokenChoice(2), balance=core.Balance(load_balancing=0.5))


class Steady(TinyModule):
    """Its loss does not ask for the step."""

    def task_loss(self, batch):
        logits = self(batch[0])
        return TaskOutput(nn.functional.cross_entropy(logits, batch[1]), logits, batch[1], len(batch[1]))


class Unlogged(Net):
    """Its step logs nothing: torch cannot trace Lightning's ``log``."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Graphs(Callback):
    """Notes how many graphs were compiled until the end of each training step."""

    def __init__(self) -> None:
        self.counter, self.after = CompileCounter(), list[int]()

    def on_train_batch_end(self, *_: object) -> None:
        self.after.append(self.counter.frame_count)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("module", ["suite", "sparsified"])
def test_a_compiled_module_is_not_compiled_again_at_each_step(module, graphs, tmp_path):
    section = SparsifyConfig("blocks.*", LAYERS)
    made = Steady(3, moe=MOE) if module == "suite" else sparsified(Unlogged(), section)
    compiled = torch.compile(made, backend=graphs.counter)
    fit(compiled, tmp_path, graphs, data=TinyData(n=48), max_epochs=2, limit_val_batches=0)
    assert len(graphs.after) == 12
    assert graphs.after[0] > 0
    assert set(graphs.after[1:]) == {graphs.after[1]}
