"""SparseModule: the loss, the optimizer, the metrics and the log, on a model of a few hundred parameters."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from tiny_app import TinyData, TinyModule
from torchmetrics import Metric
from trainings import MOE, fit, load, rows

import core
from apps.train.optim.averaging import WeightEMA
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.step import measures
from apps.train.step.balance import routing_metrics
from apps.train.step.finite import NonFiniteError
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
    module.balance.weight = 0.5
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


def test_a_dense_model_has_no_auxiliary_loss_and_a_decay_has_a_range(tmp_path):
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="ema_decay"):
            TinyModule(3, ema_decay=decay)
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


def test_the_imbalance_of_a_pass_is_that_of_the_sum_without_layers_of_one_expert():
    # Each batch uses one expert (imbalance 2); together they are balanced (imbalance 1).
    assert routing_metrics(stats([4, 0]))["routing/l/load_imbalance"] == 2
    assert routing_metrics(stats([4, 0]) + stats([0, 4]))["routing/load_imbalance"] == 1
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


def test_a_loss_that_is_nan_names_step_terms_and_advice_and_spares_the_checkpoint(tmp_path):
    module = TinyModule(3, moe=MOE, explode_at=12, ema_decay=0.9)  # 9 steps an epoch
    with pytest.raises(NonFiniteError, match=r"nan at step 13 \(task loss=nan, load_balancing_loss=.*lr \(now 0.001\)"):
        fit(module, tmp_path, max_epochs=3)
    checkpoint = load(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 9
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 18:  # the last step of the second epoch: the loss is seen no more
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"net\.0\.weight is not finite after step 18"):
        fit(TinyModule(3), tmp_path, Poison(), max_epochs=2)
    assert load(tmp_path / "last.ckpt")["global_step"] == 9


def test_routing_size_and_speed_are_logged(tmp_path):
    fit(TinyModule(3, moe=MOE), tmp_path)
    columns = {k: v for r in rows(tmp_path) for k, v in r.items() if v}
    for figure in ("load_imbalance", "entropy", "drop_rate", "dead_experts"):
        assert f"routing/net.3/{figure}" in columns
        assert f"val/routing/{figure}" in columns
    assert float(columns["train/examples_per_second"]) > 0
    assert 50 < float(columns["train/peak_memory_mib"]) < 1e5
    # Linear 2 x 8, router 8 x 4, two of four experts with 2 x 8 x 8, linear 8 x 3; two FLOPs a multiply-add.
    assert float(columns["model/flops_per_example"]) == 2 * (2 * 8 + 8 * 4 + 2 * 2 * 8 * 8 + 8 * 3)


def test_the_speed_leaves_the_validation_out(monkeypatch):
    now = 0.0
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now)
    trainer = SimpleNamespace(global_step=10, log_every_n_steps=10, world_size=2, sanity_checking=False, loggers=[])
    trainer.state = SimpleNamespace(fn="fit")
    logged = []
    log_dict = lambda values, **_: logged.append(values["train/examples_per_second"])  # noqa: E731
    module = SimpleNamespace(num_trained=0, log_dict=log_dict, device=torch.device("cpu"))
    speed = measures.TrainingMeasures()
    speed.on_train_start(trainer, module)
    now = 2.0
    speed.on_validation_start(trainer, module)
    now = 5.0
    speed.on_validation_end(trainer, module)
    now, module.num_trained = 7.0, 8
    speed.on_train_batch_end(trainer, module, None, None, 0)
    now, module.num_trained = 8.0, 11
    speed.on_train_batch_end(trainer, module, None, None, 1)
    # 8 examples in 7 - 3 s, then 3 in 1 s, on each of two processes.
    assert logged == [4.0, 6.0]


class Norms(Callback):
    """Keeps the norm of the gradients as the optimizer gets them, before it clips them."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))


def test_the_gradient_norm_is_that_before_clipping_at_the_steps_that_are_logged(tmp_path, monkeypatch):
    computed, norm = [], measures.gradient_norm
    monkeypatch.setattr(measures, "gradient_norm", lambda p: computed.append(1) or norm(p))
    norms = Norms()
    # 66 points in batches of 8 are 9 steps, of which the 4th and the 8th are logged.
    fit(TinyModule(3, moe=MOE), tmp_path, norms, gradient_clip_val=1e-3, log_every_n_steps=4)
    logged = {int(r["step"]): float(r["train/grad_norm"]) for r in rows(tmp_path) if r["train/grad_norm"]}
    assert logged == pytest.approx({3: norms.norms[3], 7: norms.norms[7]}, rel=1e-5)
    assert len(computed) == 2


def test_the_norm_of_sparse_gradients_sums_the_rows_that_were_picked_twice():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    # Row 1 has (2, 2) and row 3 (1, 1).
    assert float(measures.gradient_norm(table.parameters())) == pytest.approx(10**0.5)
    assert not table.weight.grad.is_coalesced()  # the optimizer gets it as it was
    assert measures.gradient_norm(torch.nn.Linear(1, 1).parameters()) is None
