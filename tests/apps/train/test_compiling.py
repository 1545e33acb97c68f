"""A compiled training compiles each shape once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compared import CONFIG as COMPARED
from lightning.pytorch import Callback
from own_net import Net
from tiny_app import TinyData, TinyModule
from tiny_runs import copy_run
from torch import nn
from torch._dynamo.testing import CompileCounter
from trainings import MOE, fit

import core
from apps.cli.train import build
from apps.compare.experiment import Experiment
from apps.train.sparsified import SparsifyConfig, sparsified
from apps.train.step.module import TaskOutput

LAYERS = core.MoEConfig(4, core.TokenChoice(2), balance=core.Balance(load_balancing_loss=0.5))


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


def test_a_configuration_compiles_the_networks_and_changes_nothing_else(
    graphs, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    copy_run(tmp_path_factory, tmp_path).rename("plain")
    words = ["fit", "--config", "tiny.yaml"]
    Path("eager.yaml").write_text("compile: {backend: eager}")
    cli = build(*words[:1], [*words[1:], "--config", "eager.yaml", "--run_dir", "compiled"])
    stats, seen = torch._dynamo.utils.counters["stats"], []
    graphs.on_train_batch_end = lambda *_: seen.append(stats["unique_graphs"])
    cli.trainer.callbacks.append(graphs)
    cli.execute()
    assert seen[0] > 0
    assert len(set(seen[1:])) == 1  # three steps
    assert "compiled: TinyModule (backend=eager)" in capsys.readouterr().out
    plain, compiled = (torch.load(f"{r}/checkpoints/last.ckpt", weights_only=True) for r in ("plain", "compiled"))
    assert plain["state_dict"].keys() == compiled["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(compiled["state_dict"][name], value)
    assert build("test", ["--run_dir", "compiled"]).compiled is not None  # as the run's own configuration says
    assert build("predict", ["--run_dir", "compiled", "--compile", "false"]).compiled is None
    Path("compared.yaml").write_text(COMPARED)
    module = Experiment(["--config", "compared.yaml", "--compile", "true"]).module("dense_equal_flops")
    assert any(m._compiled_call_impl is not None for m in module.modules())
