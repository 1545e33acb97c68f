"""``RoutingDoctor`` in trainings of a tiny model: what it says, when, and that the training is the same with it.

Two processes say together what one would say of the data of both."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import divided_runs
import pytest
import torch
import torch.distributed as dist
from quiet_trainer import quiet_trainer
from tiny_app import TinyData, TinyModule
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset
from two_ranks import on_two_ranks

import core
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from apps.train.step.module import OptimizerConfig
from apps.train.watch.doctor import RoutingDoctor, classes_of

MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=8))


def trained(folder, doctor=None, plant=None, moe=MOE, **options):
    torch.manual_seed(0)
    module = TinyModule(3, moe=moe, optimizer=OptimizerConfig(lr=1e-2, **options))
    if plant is not None:
        plant(module)
    callbacks = [] if doctor is None else [doctor]
    quiet_trainer(folder, max_epochs=1, callbacks=callbacks).fit(module, TinyData(n=240))
    return module


def said(caplog):
    return [record.message for record in caplog.records if record.name == "apps.train.watch.doctor"]


def test_a_healthy_training_is_the_same_with_it(tmp_path, caplog):
    doctor = RoutingDoctor(classes=True)
    with caplog.at_level(logging.INFO, "apps.train.watch.doctor"):
        watched = trained(tmp_path, doctor)
    assert doctor.findings == []
    assert said(caplog) == ["routing: healthy"]
    assert_close(watched.state_dict(), trained(tmp_path).state_dict(), rtol=0, atol=0)


def test_a_finding_is_said_once_and_once_more_when_it_is_gone(tmp_path, caplog):
    module, doctor = TinyModule(3, moe=MOE), RoutingDoctor()
    experts = module.net[3].experts
    trainer = quiet_trainer(tmp_path, callbacks=[doctor])
    with caplog.at_level(logging.INFO, "apps.train.watch.doctor"), torch.no_grad():
        for same in (True, True, False):
            for p in experts.parameters():
                p.copy_(p[:1].expand_as(p) if same else torch.randn_like(p))
            trainer.validate(module, TinyData(n=24), verbose=False)
    first, last = said(caplog)
    assert first.startswith("routing: error: net.3: same experts: 6 of 6 pairs")
    assert last == "routing: net.3: no more same experts"


def test_weights_that_stood_still_and_a_gradient_that_is_cut(tmp_path):
    def cut(module):
        router = module.net[3].router
        router.register_forward_hook(lambda m, args, out: replace(out, gates_N=out.gates_N.detach()))

    balance = core.Balance(load_balancing_loss=0.0, router_z_loss=0.0)
    doctor = RoutingDoctor()
    trained(tmp_path, doctor, plant=cut, moe=replace(MOE, balance=balance), weight_decay=0.0, expert_lr_scale=0.01)
    assert [f.name for f in doctor.findings] == ["no_router_gradient", "gates_at_start", "slow_experts"]


def test_a_dense_model_is_left_alone_and_classes_are_those_of_a_task_with_one_an_example(tmp_path):
    doctor = RoutingDoctor()
    trained(tmp_path, doctor, moe=None)
    assert (doctor.findings, doctor.doctor) == ([], None)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    assert classes_of(TinyModule(3, moe=MOE), (x, y)).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"RoutingDoctor.batches=0 must be at least 1"):
        RoutingDoctor(batches=0)


# ---- two processes

STRATEGIES: dict[str, dict[str, Any]] = {
    "experts": {},
    "fsdp": {"expert_parallel_size": 1, "fsdp_size": 2, "non_experts": "shard"},
}


class Doubled(TinyModule):
    """A model whose step adds the balance losses twice."""

    def training_loss(self, batch):
        loss = super().training_loss(batch)
        return loss._replace(total=loss.total + loss.aux.total)


class Lopsided(divided_runs.Points):
    """Points whose validation is six batches on rank 0 and two on rank 1."""

    def val_dataloader(self):
        points = Subset(self.points, range(24 if dist.get_rank() == 0 else 8))
        return DataLoader(points, self.batch_size)


def diagnosed(folder, kind, strategy):
    """Return the findings of a training, and what was logged of them."""
    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("apps.train.watch.doctor"), logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    doctor, net = RoutingDoctor(), kind(3, moe=MOE, optimizer=OptimizerConfig(lr=1e-2))
    options = {"callbacks": [doctor], "use_distributed_sampler": False}
    divided_runs.fit(folder, net, strategy, divided_runs.WORLD, **options)
    logger.removeHandler(handler)
    return [str(f) for f in doctor.findings], [r.getMessage() for r in records]


def on_rank(rank, folder):
    divided_runs.as_rank(rank)
    results = {"healthy": diagnosed(folder / "healthy", TinyModule, ExpertParallelStrategy(expert_parallel_size=1))}
    divided_runs.Points = Lopsided  # type: ignore[misc]
    results["uneven"] = diagnosed(folder / "uneven", Doubled, ExpertParallelStrategy(expert_parallel_size=1))
    divided_runs.Points = Lopsided.__base__  # type: ignore[misc]
    for name, options in STRATEGIES.items():
        results[name] = diagnosed(folder / name, Doubled, ExpertParallelStrategy(**options))
    return results


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(tmp_path):
    first, second = on_two_ranks(functools.partial(on_rank, folder=tmp_path), tmp_path)
    assert first["healthy"] == ([], ["routing: healthy"])
    assert second["healthy"] == ([], [])
    for name in ("uneven", *STRATEGIES):
        findings, lines = first[name]
        assert len(findings) == 1, name
        assert findings[0].startswith("error: net.3: doubled balance: the balance loss is 2 times in the loss"), name
        assert lines == [f"routing: {findings[0]}"]
        assert second[name] == (findings, [])
