"""A LightningModule of the user's own, made sparse: its steps, beside the same steps written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from own_net import Net, Points, Unvalidated
from tiny_app import TinyModule
from torch import nn
from trainings import MOE, fit, load, rows

import core
from apps.train.sparsified import SparsifyConfig, sparsified
from core.convert import SplitStart

LAYERS = core.MoEConfig(
    4, core.TokenChoice(2, expert_bias=True), balance=core.Balance(load_balancing_loss=0.5, router_z_loss=0.0)
)
CONFIG = SparsifyConfig("blocks.*", LAYERS, metric="val_acc", mode="max")


def written_out(sparse: LightningModule, batch, lr: float) -> None:
    """Do a step of gradient descent on the task's loss plus the balance losses, and of the selection biases."""
    net = nn.Module.__call__  # not the wrapped step
    with core.record(sparse) as tape:
        loss = nn.functional.cross_entropy(net(sparse, batch[0]), batch[1])
    (loss + core.aux_loss(tape)).backward()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter -= lr * parameter.grad
            parameter.grad = None
    core.update_expert_bias(sparse, tape)


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_a_step_minimizes_the_tasks_loss_plus_the_balance_losses_and_moves_the_biases(returns, tmp_path: Path) -> None:
    sparse = sparsified(Net(lr=0.1, returns=returns), CONFIG)
    expected = copy.deepcopy(sparse)
    data = Points(batch_size=24)
    fit(sparse, tmp_path, data=data)
    for batch in data.train_dataloader():
        written_out(expected, batch, 0.1)
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert sparse.blocks[0].moe.router.expert_bias.abs().max() > 0
    logged = rows(tmp_path)[0]
    # aux_loss = 0.5 load_balancing_loss: the weight times the one term in use.
    assert float(logged["train/aux_loss"]) == pytest.approx(0.5 * float(logged["train/load_balancing_loss"]), rel=1e-6)
    assert 1 <= float(logged["routing/blocks.0.moe/load_imbalance"]) <= 4


def test_a_step_that_returns_none_skips_its_batch(tmp_path: Path) -> None:
    sparse = sparsified(Net(lr=0.1, returns="none"), CONFIG)
    expected = copy.deepcopy(sparse)
    data = Points(batch_size=24)  # two batches, of which the second is skipped
    fit(sparse, tmp_path, data=data)
    written_out(expected, next(iter(data.train_dataloader())), 0.1)
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_losses_of_accumulated_batches_are_divided_as_the_tasks_are(tmp_path: Path) -> None:
    whole = sparsified(Net(lr=0.1), SparsifyConfig("blocks.*", core.MoEConfig(2, core.TokenChoice(2))))
    halves = copy.deepcopy(whole)
    # All experts take all tokens, so that the balance loss of a half is that of the whole.
    fit(whole, tmp_path / "whole", data=Points(batch_size=48))
    fit(halves, tmp_path / "halves", data=Points(batch_size=24), accumulate_grad_batches=2)
    for name, value in halves.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_class_keeps_its_name_and_gets_no_step_that_it_lacks() -> None:
    config = SparsifyConfig("mlp", core.MoEConfig(2))
    sparse = sparsified(Unvalidated(), config)
    kind = type(sparse)
    assert (kind.__name__, kind.__module__) == ("Unvalidated", "own_net")
    assert isinstance(sparse, Unvalidated)
    assert kind.training_step is not Unvalidated.training_step
    assert kind.validation_step is LightningModule.validation_step


def test_the_checkpoint_names_the_metrics_best_epoch_and_the_section(tmp_path: Path) -> None:
    sparse = sparsified(Net(), CONFIG)
    fit(sparse, tmp_path, data=Points(), max_epochs=2)
    assert load(tmp_path / "best.ckpt")["callbacks"]["BestAndLast"]["monitor"] == "val_acc"
    kept = load(tmp_path / "last.ckpt")["sparsify"]
    assert kept["moe"]["num_experts"] == 4
    assert kept["modules"] == "blocks.*"


def test_the_metric_is_best_where_the_module_or_the_section_says() -> None:
    class Judged(Net):
        monitor, monitor_mode = "val_loss", "min"

    def direction(module: LightningModule, **section: str) -> tuple[str, str]:
        sparse = sparsified(module, SparsifyConfig("blocks.*", LAYERS, **section))
        return sparse.monitor, sparse.monitor_mode

    assert direction(Judged()) == ("val_loss", "min")
    assert direction(Judged(), metric="val_other") == ("val_other", "min")
    assert direction(Judged(), mode="max") == ("val_loss", "max")
    with pytest.raises(ValueError, match=r"sparsify.mode is missing: max or min, whichever val_f1 is best at"):
        direction(Net(), metric="val_f1")


def test_gates_follow_the_seed_of_the_run_unless_the_section_has_one() -> None:
    def gate(seed: int, config: SparsifyConfig) -> torch.Tensor:
        torch.manual_seed(seed)
        return sparsified(Net(), config).blocks[0].moe.router.gate.weight

    assert torch.equal(gate(0, CONFIG), gate(0, CONFIG))
    assert not torch.equal(gate(0, CONFIG), gate(1, CONFIG))
    fixed = SparsifyConfig("blocks.*", LAYERS, seed=3)
    assert torch.equal(gate(0, fixed), gate(1, fixed))


def with_a_balance() -> Net:
    net = Net()
    net.balance = 0.4
    return net


@pytest.mark.parametrize(
    ("module", "modules", "rule"),
    [
        (lambda: Net(by_hand=True), "blocks.*", "Net optimizes by hand"),
        (lambda: TinyModule(3, moe=MOE), "net.3", "TinyModule has MoE layers by its own options"),
        (with_a_balance, "blocks.*", "sparsify adds 'balance' to Net, which has an attribute of that name"),
        (Net, "layers.*", "names no module; the model's feed-forward networks are blocks.0"),
    ],
)
def test_what_cannot_be_made_sparse_is_refused(module, modules, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        sparsified(module(), SparsifyConfig(modules, LAYERS))


@pytest.mark.parametrize(
    ("start", "rule"),
    [
        ("kopie", r"start='kopie' is not one of copy, granular, drop, split, random"),
        (SplitStart("coactivation"), r"sparsify.start=SplitStart\(.*\) reads inputs, which no section gives"),
        (SplitStart("importance"), r"sparsify.start=SplitStart\(.*\) reads importances, which no section gives"),
    ],
)
def test_a_start_that_no_section_can_have_is_refused(start, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        SparsifyConfig("blocks.*", LAYERS, start)
