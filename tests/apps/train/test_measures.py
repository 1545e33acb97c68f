"""The size and the speed that a training logs."""

from __future__ import annotations

from types import SimpleNamespace

from tiny_app import TinyModule
from trainings import MOE, fit, rows

from apps.train import measures


def test_routing_size_and_speed_are_logged(tmp_path):
    fit(TinyModule(3, moe=MOE), tmp_path)
    columns = {k: v for r in rows(tmp_path) for k, v in r.items() if v}
    for figure in ("load_imbalance", "entropy", "drop_rate", "dead_experts"):
        assert f"routing/net.3/{figure}" in columns
        assert f"val/routing/{figure}" in columns
    assert float(columns["train/examples_per_second"]) > 0
    # Linear 2 x 8, router 8 x 4, two of four experts with 2 x 8 x 8, linear 8 x 3; two FLOPs a multiply-add.
    assert float(columns["model/flops_per_example"]) == 2 * (2 * 8 + 8 * 4 + 2 * 2 * 8 * 8 + 8 * 3)


def test_the_speed_leaves_the_validation_out(monkeypatch):
    now = 0.0
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now)
    trainer = SimpleNamespace(global_step=10, log_every_n_steps=10, world_size=2, sanity_checking=False)
    trainer.state = SimpleNamespace(fn="fit")
    logged = []
    module = SimpleNamespace(num_trained=0, log=lambda name, value, **_: logged.append(value))
    speed = measures.Throughput()
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
