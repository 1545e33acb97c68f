"""The size and the speed that a training logs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_app import TinyModule
from trainings import MOE, fit, rows

from apps.train.step import measures


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
