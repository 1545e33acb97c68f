"""Training with gradients that are sparse tensors of rows."""

from __future__ import annotations

import pytest
import torch
from tiny_app import TinyModule
from torch import nn
from trainings import fit

import core
from apps.train.optim.optimizers import OptimizerConfig, build_optimizer
from apps.train.optim.row_gradients import check_processes, clip_with_rows

# With betas of 0 a row without a gradient stays under dense Adam too, and the large eps lets the size of a gradient
# count. So both kinds of gradients train alike.
ROW_ADAM = OptimizerConfig(name="row_adam", lr=0.05, weight_decay=0.0, betas=(0.0, 0.0), eps=0.1)


def module(row_sparse: bool, optimizer: OptimizerConfig = ROW_ADAM, **options) -> TinyModule:
    torch.manual_seed(0)
    moe = core.MoEConfig(16, core.ProductKeys(top_k=2, heads=2), core.PEER(row_sparse=row_sparse))
    return TinyModule(3, moe=moe, optimizer=optimizer, **options)


def weights(trained: TinyModule) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_and_accumulated_rows_train_as_dense_gradients(algorithm, tmp_path):
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    trained = []
    for row_sparse in (False, True):
        trained.append(module(row_sparse))
        torch.manual_seed(1)
        fit(trained[-1], tmp_path / str(row_sparse), **options)
    torch.testing.assert_close(weights(trained[1]), weights(trained[0]), rtol=1e-4, atol=1e-6)
    torch.manual_seed(1)
    fit(free := module(True), tmp_path / "free", accumulate_grad_batches=2)
    assert not torch.allclose(free.net[3].experts.u, trained[1].net[3].experts.u, rtol=0, atol=1e-3)  # it did clip


def test_a_resumed_run_ends_where_one_run_ends(tmp_path):
    config = OptimizerConfig(name="row_adam", lr=0.05, schedule="constant", warmup_steps=2)
    options = {"gradient_clip_val": 0.1}
    whole, rest = (module(True, config, ema_decay=0.9) for _ in range(2))
    for name, trained, epochs in (("whole", whole, 2), ("parts", module(True, config, ema_decay=0.9), 1)):
        torch.manual_seed(1)
        fit(trained, tmp_path / name, max_epochs=epochs, **options)
    fit(rest, tmp_path / "parts", max_epochs=2, ckpt_path=str(tmp_path / "parts" / "last.ckpt"), **options)
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)


def test_clipping_by_hand():
    # A row picked twice counts once, as its sum: the gradient is (3, 0) + (0, 4) in row 1, of norm 5.
    table = nn.Parameter(torch.zeros(4, 2))
    table.grad = torch.sparse_coo_tensor([[1, 1]], [[3.0, 0.0], [0.0, 4.0]], (4, 2), check_invariants=True)
    assert clip_with_rows([table], 1.0, "norm")
    torch.testing.assert_close(table.grad.to_dense()[1], torch.tensor([0.6, 0.8]))
    assert clip_with_rows([table], 0.7, "value")
    torch.testing.assert_close(table.grad.to_dense()[1], torch.tensor([0.6, 0.7]))
    table.grad = torch.ones(4, 2)
    assert not clip_with_rows([table], 1.0, "norm")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_that_takes_no_rows_is_refused_with_a_remedy(name):
    config = OptimizerConfig(name=name)
    with pytest.raises(ValueError, match=rf"'{name}' takes no sparse .* net\.3\.experts makes: .*row_adam"):
        module(True, config).configure_optimizers()
    with pytest.raises(ValueError, match="which 0 makes"):
        build_optimizer(nn.Sequential(nn.Embedding(4, 2, sparse=True)), config)
    module(False, config).configure_optimizers()


def test_rows_on_several_processes_are_refused():
    check_processes(module(True), 1)
    check_processes(module(False), 2)
    with pytest.raises(ValueError, match=r"row_sparse=True of net\.3\.experts is for one process, and this run has 2"):
        check_processes(module(True), 2)
