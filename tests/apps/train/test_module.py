"""SparseModule and its callbacks, on a model of a few hundred parameters."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny_app import TinyData, TinyModule
from torchmetrics import Metric

import core
from apps.train.averaging import WeightEMA
from apps.train.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.finite import NonFiniteError
from apps.train.logs import MetricsCSV
from apps.train.module import (
    OptimizerConfig,
    parameter_groups,
    routing_metrics,
)
from apps.train.plain import from_plain, to_plain
from apps.train.progress import EpochLines
from apps.train.resume import GeneratorState, generator_state, restore_generators

MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8, bias=True))
BIAS_ROUTER = core.TokenChoice(top_k=2, expert_bias=True)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def trainer(folder: Path, *callbacks, **options) -> Trainer:
    options = {"max_epochs": 1, "logger": MetricsCSV(str(folder)), "log_every_n_steps": 1} | options
    return Trainer(
        callbacks=[GeneratorState(), BestAndLast(str(folder)), *callbacks],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(module, folder, *callbacks, data=None, ckpt_path=None, **options) -> Trainer:
    made = trainer(folder, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*many workers.*|.*LeafSpec.*")
        made.fit(module, data or TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


# ---- the loss


def test_the_returned_loss_is_the_task_s_plus_the_weighted_auxiliary_loss(tmp_path):
    module = TinyModule(3, moe=MOE, dropout=0.0)
    seen = {}

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["returned"] = float(outputs["loss"])

    fit(module, tmp_path, Spy(), data=TinyData(n=8))
    row = next(r for r in rows(tmp_path) if r["train/loss"])
    # Balance's defaults: 0.01 * load_balancing + 0.001 * router_z; the terms are logged without their weights.
    aux = 0.01 * float(row["train/load_balancing"]) + 0.001 * float(row["train/router_z"])
    assert float(row["train/aux_loss"]) == pytest.approx(aux, rel=1e-5)
    assert seen["returned"] == pytest.approx(float(row["train/loss"]) + aux, rel=1e-5)


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


def test_warm_up_then_cosine_by_hand():
    config = OptimizerConfig(warmup=2, min_lr_ratio=0.1)
    # 2 steps up (1/2, 2/2), then 8 steps down: half way, at step 6, 0.1 + 0.9 * (1 + cos(pi/2)) / 2 = 0.55.
    assert [config.factor(s, 10) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert config.factor(50, 10) == pytest.approx(0.1)
    assert OptimizerConfig(warmup=0.25).warmup_steps(40) == 10
    assert OptimizerConfig(warmup=0.25).factor(5, math.inf) == 1.0
    assert OptimizerConfig(warmup=0, schedule="constant").factor(9, 10) == 1.0


def test_warm_up_then_inverse_root_by_hand():
    config = OptimizerConfig(warmup=4, schedule="inverse_sqrt")
    # Up by quarters; at the n-th step, which is number n - 1, sqrt(4 / n): 1 at the 4th, 1/2 at the 16th, 1/5 at the
    # 100th. The length of the run has no say.
    for total in (100, math.inf):
        assert [config.factor(s, total) for s in (0, 3, 15, 99)] == pytest.approx([0.25, 1.0, 0.5, 0.2])
    floored = dataclasses.replace(config, min_lr_ratio=0.4)
    assert [floored.factor(s, 100) for s in (0, 15, 99)] == pytest.approx([0.25, 0.5, 0.4])
    # A fraction of all steps: 0.04 of 100 are 4. None: it falls from the first step on.
    assert dataclasses.replace(config, warmup=0.04).factor(15, 100) == pytest.approx(0.5)
    assert [dataclasses.replace(config, warmup=0).factor(s, 100) for s in (0, 3)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"warmup": 2.5},
        {"min_lr_ratio": 1.5},
        {"schedule": "linear"},
        {"router_lr_scale": -1.0},
        {"fused": True, "name": "muon"},
    ],
)
def test_a_wrong_optimizer_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}="):
        OptimizerConfig(**wrong)


def test_groups_hold_each_parameter_once_and_spare_biases_and_norms():
    module = TinyModule(3, moe=MOE)
    config = OptimizerConfig(
        lr=1.0, weight_decay=0.5, router_lr_scale=0.1, expert_lr_scale=2.0, expert_weight_decay_scale=3.0
    )
    groups = {g["name"]: g for g in parameter_groups(module, config)}
    names = {id(p): n for n, p in module.named_parameters()}
    members = {g: sorted(names[id(p)] for p in group["params"]) for g, group in groups.items()}
    assert members == {
        "router": ["net.3.router.gate.weight"],
        "experts": ["net.3.experts.w_in", "net.3.experts.w_out"],
        "experts_no_decay": ["net.3.experts.b_in", "net.3.experts.b_out"],
        "rest": ["net.0.weight", "net.4.weight"],
        "rest_no_decay": ["net.0.bias", "net.1.bias", "net.1.weight", "net.4.bias"],
    }
    rates = {g: (group["lr"], group["weight_decay"]) for g, group in groups.items()}
    assert rates == {
        "router": (0.1, 0.5),
        "experts": (2.0, 1.5),
        "experts_no_decay": (2.0, 0.0),
        "rest": (1.0, 0.5),
        "rest_no_decay": (1.0, 0.0),
    }


def test_a_frozen_parameter_and_a_model_s_own_exemptions_are_honoured():
    module = TinyModule(3)
    module.net[0].weight.requires_grad = False
    module.net.no_weight_decay = lambda: {"3.weight"}
    groups = {g["name"]: len(g["params"]) for g in parameter_groups(module, OptimizerConfig())}
    assert groups == {"rest_no_decay": 5}


def test_resuming_with_another_rate_takes_the_new_one(tmp_path):
    def rates(lr: float, **options) -> list[float]:
        config = OptimizerConfig(lr=lr, weight_decay=lr, warmup=0, schedule="constant")
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


# ---- the average


def test_the_average_moves_as_the_formula_says():
    module = TinyModule(3)
    average = WeightEMA(0.99)
    average.on_fit_start(None, module)
    before = module.net[0].weight.detach().clone()
    with torch.no_grad():
        module.net[0].weight.add_(1.0)

    class AtStepOne:
        global_step = 1

    average.on_train_batch_end(AtStepOne, module, None, None, 0)
    # d = min(0.99, 2 / 11), so the average has moved by 9/11 of the 1.0 that was added.
    assert torch.allclose(average.average["net.0.weight"], before + 9 / 11)
    average.on_train_batch_end(AtStepOne, module, None, None, 1)  # a micro-batch of the same step
    assert torch.allclose(average.average["net.0.weight"], before + 9 / 11)


def test_the_average_is_what_is_validated_saved_and_left(tmp_path):
    module = TinyModule(3, moe=MOE, ema_decay=0.9, optimizer=OptimizerConfig(lr=0.05))
    fit(module, tmp_path, max_epochs=2)
    checkpoint = load(tmp_path / "last.ckpt")
    trained, average = checkpoint["trained_state_dict"], checkpoint["state_dict"]
    assert not torch.equal(trained["net.0.weight"], average["net.0.weight"])
    assert torch.equal(module.net[0].weight, average["net.0.weight"])
    fresh = TinyModule(3, moe=MOE)
    fresh.load_state_dict(average)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trainer(tmp_path / "again", logger=False).validate(fresh, TinyData(), verbose=False)
    last = [r for r in rows(tmp_path) if r["val/loss"]][-1]
    assert found[0]["val/loss"] == pytest.approx(float(last["val/loss"]))


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        TinyModule(3, ema_decay=decay)


# ---- what goes wrong


def test_a_loss_that_is_nan_names_step_terms_and_advice_and_spares_the_checkpoint(tmp_path):
    module = TinyModule(3, moe=MOE, explode_at=12, ema_decay=0.9)  # 9 steps an epoch
    with pytest.raises(NonFiniteError, match=r"nan at step 13 \(task loss=nan, load_balancing=.*lr \(now 0.001\)"):
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


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"n": 1}, path)

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: No space left on device; the earlier one is"):
        io.save_checkpoint({"n": 2}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert load(path) == {"n": 1}


# ---- checkpoints


def test_checkpoints_of_an_earlier_run_are_put_aside_before_the_first_step(tmp_path):
    for _ in range(2):
        fit(TinyModule(3), tmp_path, max_epochs=2)
    (tmp_path / "average.ckpt").write_bytes(b"of the earlier run")

    class Killed(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(TinyModule(3), tmp_path, Killed())
    assert not list(tmp_path.glob("*.ckpt"))
    assert {p.name for p in (tmp_path / "earlier").iterdir()} == {"best.ckpt", "last.ckpt", "average.ckpt"}
    assert load(tmp_path / "earlier" / "last.ckpt")["epoch"] == 1


def fit_with_scores(folder: Path, scores: list[float]) -> Trainer:
    """An epoch for each validation score, of which the highest is the best."""
    rest = iter(scores)

    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/score", next(rest))

    module = TinyModule(3)
    module.monitor, module.monitor_mode = "val/score", "max"
    return fit(module, folder, Score(), max_epochs=len(scores))


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    made = fit_with_scores(tmp_path, [math.nan, 0.5, 0.7])
    assert made.checkpoint_callback.best_score == pytest.approx(0.7)
    assert load(tmp_path / "best.ckpt")["epoch"] == 2


def test_the_best_is_the_best_and_the_last_is_the_last(tmp_path):
    made = fit_with_scores(tmp_path, [0.5, 0.9, 0.7])
    assert load(tmp_path / "best.ckpt")["epoch"] == 1
    assert load(tmp_path / "last.ckpt")["epoch"] == 2
    assert made.checkpoint_callback.best_score == pytest.approx(0.9)


def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path):
    module = TinyModule(3, width=10, moe=MOE, optimizer=OptimizerConfig(lr=0.02))
    fit(module, tmp_path)
    path = tmp_path / "last.ckpt"
    assert load(path)["hyper_parameters"]["moe"]["init_args"]["num_experts"] == 4
    again = TinyModule.load_from_checkpoint(path)
    assert again.optimizer_config == OptimizerConfig(lr=0.02)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
    assert TinyModule.load_from_checkpoint(path, dropout=0.7).net[2].p == 0.7


class FewOptions(TinyModule):
    """Takes none of what ``SparseModule`` and ``TinyModule`` could do besides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


def test_what_a_module_does_not_take_is_not_in_its_checkpoint(tmp_path):
    module, run = FewOptions(3), trainer(tmp_path)
    run.fit(module, TinyData())
    run.save_checkpoint(tmp_path / "few.ckpt")
    assert dict(module.hparams) == {"num_classes": 3}
    again = FewOptions.load_from_checkpoint(tmp_path / "few.ckpt", weights_only=True)
    assert torch.equal(again.net[0].weight, module.net[0].weight)


def test_plain_and_back():
    for value in (MOE, OptimizerConfig(lr=0.3), {"a": [1, None, "x"]}, core.MoEConfig(2, expert=core.SwiGLU())):
        plain = to_plain(value)
        assert from_plain(plain) == value
    with pytest.raises(ValueError, match=r"'nowhere\.Thing' is not a registered config class"):
        from_plain({"class_path": "nowhere.Thing", "init_args": {}})
    with pytest.raises(ValueError, match=r"\'os\.system\' is not a registered config class"):
        from_plain({"class_path": "os.system", "init_args": {}})


def test_generators_go_on_where_they_were(tmp_path):
    state = generator_state()
    torch.save(state, tmp_path / "state.pt")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    restore_generators(load(tmp_path / "state.pt"))
    assert drawn == (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())


# ---- the log


def test_the_log_of_a_new_run_replaces_the_old_one_and_a_resumed_run_continues_it(tmp_path):
    first = MetricsCSV(str(tmp_path))
    for step in range(4):
        first.log_metrics({"a": step}, step)
    first.log_metrics({"b": 9.0}, 3)
    assert [(r["step"], r["a"], r["b"]) for r in rows(tmp_path)][-2:] == [("3", "3.0", ""), ("3", "", "9.0")]
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,1.")  # cut by a kill
    resumed = MetricsCSV(str(tmp_path))
    resumed.continue_from(3)
    resumed.log_metrics({"a": 30.0}, 3)
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "30.0")]
    MetricsCSV(str(tmp_path)).log_metrics({"a": 5.0}, 0)
    assert [r["a"] for r in rows(tmp_path)] == ["5.0"]


def test_routing_size_and_speed_are_logged(tmp_path):
    fit(TinyModule(3, moe=MOE), tmp_path)
    columns = {k: v for r in rows(tmp_path) for k, v in r.items() if v}
    for figure in ("load_imbalance", "entropy", "drop_rate", "dead_experts"):
        assert f"routing/net.3/{figure}" in columns
        assert f"val/routing/{figure}" in columns
    assert float(columns["train/examples_per_second"]) > 0
    # Linear 2 x 8, router 8 x 4, two of four experts with 2 x 8 x 8, linear 8 x 3; two FLOPs a multiply-add.
    assert float(columns["model/flops_per_example"]) == 2 * (2 * 8 + 8 * 4 + 2 * 2 * 8 * 8 + 8 * 3)


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
    (found,) = made.test(module, TinyData(), verbose=False)
    assert found["test/top1"] == float(logged["val/top1"])  # the same points
    assert Counts.asked == [24, 24, 24]
    assert module.stage_metrics("test").seen == 0


def test_the_imbalance_of_a_pass_is_that_of_the_sum():
    def stats(counts: list[int]) -> core.RoutingStats:
        load = torch.tensor(counts)
        return core.RoutingStats({"l": core.LayerStats(load, load, torch.tensor(0.0), load.sum())})

    # Each batch uses one expert (imbalance 2); together they are balanced (imbalance 1).
    assert routing_metrics(stats([4, 0]))["routing/l/load_imbalance"] == 2
    assert routing_metrics(stats([4, 0]) + stats([0, 4]))["routing/load_imbalance"] == 1


def test_what_a_kill_in_the_middle_of_a_write_left_is_removed(tmp_path):
    (tmp_path / ".best.ckpt.tmp").write_bytes(b"half")
    fit(TinyModule(3), tmp_path, limit_train_batches=1, limit_val_batches=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "metrics.csv"]


def test_the_progress_says_what_was_reached(tmp_path, capsys):
    fit(TinyModule(3), tmp_path, EpochLines(), max_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    for value in ("train/loss", "val/loss", "val/top1"):
        assert f"  {value} " in lines[0]


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
