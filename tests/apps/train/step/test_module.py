"""SparseModule: the loss, the optimizer, the metrics and the log, on a model of a few hundred parameters."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from tiny_app import TinyData, TinyModule
from torchmetrics import Metric
from trainings import MOE, fit, rows

import core
from apps.train.optim.averaging import WeightEMA
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.step.balanced import routing_metrics
from apps.train.step.measures import ModelSize, TrainingMeasures

BIAS_ROUTER = core.TokenChoice(top_k=2, expert_bias=True)


# ---- the loss


def test_the_returned_loss_is_the_task_s_plus_the_weighted_auxiliary_loss(tmp_path):
    module = TinyModule(3, moe=MOE, dropout=0.0)
    seen = {}

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["returned"] = float(outputs["loss"])

    fit(module, tmp_path, Spy(), data=TinyData(n=8))
    row = next(r for r in rows(tmp_path) if r["train/loss"])
    # Balance's defaults: 0.01 * load_balancing_loss + 0.001 * router_z_loss; terms are logged without weights.
    aux = 0.01 * float(row["train/load_balancing_loss"]) + 0.001 * float(row["train/router_z_loss"])
    assert float(row["train/aux_loss"]) == pytest.approx(aux, rel=1e-5)
    assert seen["returned"] == pytest.approx(float(row["train/loss"]) + aux, rel=1e-5)


def test_the_auxiliary_loss_has_the_module_s_weight():
    module = TinyModule(3, moe=MOE, dropout=0.0)
    module.aux_weight = 0.5
    loss = module.training_loss((torch.randn(4, 2), torch.tensor([0, 1, 2, 0])))
    assert float(loss.aux.total) > 0
    assert torch.equal(loss.total, loss.out.loss + 0.5 * loss.aux.total)


class Reporting(TinyModule):
    def report_callbacks(self) -> list[Callback]:
        return [Callback()]


def test_reports_can_be_left_out_and_the_average_not():
    module = Reporting(3, ema_decay=0.9)
    assert [type(c) for c in module.configure_callbacks()] == [WeightEMA, ModelSize, TrainingMeasures, Callback]
    module.reports = False
    assert [type(c) for c in module.configure_callbacks()] == [WeightEMA]


def test_a_dense_model_has_no_auxiliary_loss(tmp_path):
    fit(TinyModule(3), tmp_path)
    assert not any(key.startswith("routing/") or "aux" in key for key in rows(tmp_path)[0])


def test_the_expert_bias_moves_once_an_optimizer_step_by_the_load_of_all_its_micro_batches(tmp_path, monkeypatch):
    passes = []
    original = core.update_expert_bias

    def counted(module: TinyModule, tape: core.Tape) -> None:
        # Of each micro-batch the loads are kept, and no logits.
        assert all(isinstance(entry.routing, core.contract.Loads) for entry in tape.entries)
        passes.append(len(tape))
        original(module, tape)

    monkeypatch.setattr(core, "update_expert_bias", counted)
    module = TinyModule(3, moe=core.MoEConfig(4, router=BIAS_ROUTER, expert=core.FFN(hidden_dim=8)))
    fit(module, tmp_path, data=TinyData(n=40), accumulate_grad_batches=2)  # 5 batches of 8: steps of 2, 2 and 1
    assert passes == [2, 2, 1]
    bias = module.net[3].router.expert_bias
    assert bias.abs().max() > 0


# ---- the optimizer


def test_resuming_with_another_rate_takes_the_new_one(tmp_path):
    def rates(lr: float, **options) -> list[float]:
        config = OptimizerConfig(lr=lr, weight_decay=lr, warmup_steps=0, schedule="constant")
        made = fit(TinyModule(3, moe=MOE, optimizer=config), tmp_path, **options)
        return [x for g in made.optimizers[0].param_groups for x in (g["lr"], g["initial_lr"])]

    def momentum(decay: float, **options) -> set[float]:
        config = OptimizerConfig(name="muon", muon_momentum=decay)
        made = fit(TinyModule(3, moe=MOE, optimizer=config), tmp_path / "muon", **options)
        return {g["momentum"] for g in made.optimizers[0].param_groups}

    assert set(rates(0.1)) == {0.1}
    assert set(rates(0.2, ckpt_path=str(tmp_path / "last.ckpt"), max_epochs=2)) == {0.2}
    assert momentum(0.9) == {0.9}
    assert momentum(0.8, ckpt_path=str(tmp_path / "muon" / "last.ckpt"), max_epochs=2) == {0.8}


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        TinyModule(3, ema_decay=decay)


class Counts(Metric):
    """Two values a pass, and how often they were asked for. ``groups`` are counted where they are given."""

    full_state_update = False
    asked: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(()), "sum")
        self.add_state("seen", torch.zeros(()), "sum")
        self.add_state("groups", torch.zeros(()), "sum")

    def update(self, outputs, targets, groups=None) -> None:
        self.right += (outputs.argmax(1) == targets).sum()
        self.seen += len(targets)
        self.groups += 0 if groups is None else len(groups.unique())

    def compute(self) -> dict[str, torch.Tensor]:
        self.asked.append(int(self.seen))
        return {"top1": self.right / self.seen, "groups": self.groups, "seen": self.seen}


class CountingModule(TinyModule):
    monitor = "val/top1"
    shown_metrics = ("groups",)
    grouped = False

    def build_metrics(self) -> Counts:
        return Counts()

    def task_loss(self, batch):
        out = super().task_loss(batch)
        return dataclasses.replace(out, groups=torch.arange(out.num_examples) // 4) if self.grouped else out


@pytest.mark.parametrize("grouped", [False, True])
def test_a_metric_of_many_values_is_computed_once_a_pass(tmp_path, monkeypatch, grouped):
    monkeypatch.setattr(CountingModule, "grouped", grouped)
    monkeypatch.setattr(Counts, "asked", [])
    module = CountingModule(3)
    made = fit(module, tmp_path, max_epochs=2)
    # 24 points in batches of 8: all of them, each epoch anew.
    assert Counts.asked == [24, 24]
    logged = made.callback_metrics
    assert float(logged["val/groups"]) == (6 if grouped else 0)
    assert {"val/top1", "val/groups", "val/loss"} <= set(made.progress_bar_metrics)
    assert "val/seen" not in made.progress_bar_metrics
    assert float(rows(tmp_path)[-1]["val/seen"]) == 24
    (tested,) = made.test(module, TinyData(), verbose=False)
    assert tested["test/top1"] == float(logged["val/top1"])  # the same points
    assert Counts.asked == [24, 24, 24]
    assert module.stage_metrics("test").seen == 0


def stats(counts: list[int], name: str = "l") -> core.RoutingStats:
    load = torch.tensor(counts)
    return core.RoutingStats({name: core.LayerStats(load, load, torch.tensor(0.0), load.sum())})


def test_the_imbalance_of_a_pass_is_that_of_the_sum():
    # Each batch uses one expert (imbalance 2); together they are balanced (imbalance 1).
    assert routing_metrics(stats([4, 0]))["routing/l/load_imbalance"] == 2
    assert routing_metrics(stats([4, 0]) + stats([0, 4]))["routing/load_imbalance"] == 1


def test_the_mean_over_the_layers_leaves_out_layers_of_one_expert():
    figures = routing_metrics(stats([4, 0], "a") + stats([3, 1], "b") + stats([8], "gate"))
    assert [figures[f"routing/{name}/load_imbalance"] for name in ("a", "b", "gate")] == [2, 1.5, 1]
    assert figures["routing/load_imbalance"] == 1.75  # of a and b
    assert routing_metrics(stats([8]))["routing/load_imbalance"] == 1  # no other layers


def test_the_loss_at_an_epochs_end_is_the_mean_over_processes(tmp_path, monkeypatch):
    # 66 examples in batches of 8: nine steps, none of which is logged, and the last one is shown.
    calls = []

    def over_processes(self, values):
        calls.append(self.trainer.is_last_batch)
        return {name: value * 0 + 7 for name, value in values.items()}

    monkeypatch.setattr(TinyModule, "_mean_over_processes", over_processes)
    made = fit(TinyModule(3), tmp_path, log_every_n_steps=100)
    assert calls == [True]
    assert float(made.callback_metrics["train/loss"]) == 7
