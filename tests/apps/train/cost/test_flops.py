"""The cost of a model is the same figure in a training and in a comparison."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from tiny_app import TinyModule
from torch.utils.data import DataLoader, TensorDataset

import core
from apps.compare.systems import find_systems
from apps.equal_cost.comparison import Baseline, Comparison
from apps.train.cost.flops import measure_cost, megaflops, num_examples
from apps.train.step.module import TaskOutput
from apps.train.watch.logs import MetricsCSV

MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8, bias=True))


class Rows(TinyModule):
    """Classifies a row of points by the mean of their logits."""

    def forward(self, x_BSD):
        return self.net(x_BSD).mean(1)

    def task_loss(self, batch):
        logits = self(batch[0])
        return TaskOutput(torch.nn.functional.cross_entropy(logits, batch[1]), logits, batch[1], len(logits))

    def cost_unit(self, batch):
        return f"a row of {batch[0].shape[1]} points"


class RowComparison(Comparison):
    def baselines(self):
        return {"dense": Baseline(lambda: Rows(3))}


COMPARISON = RowComparison


class Called:
    """A network under the interface of a module."""

    def __init__(self, net):
        self.module, self.cost_inputs, self.cost_unit = net, lambda x: (x,), lambda x: "a row"

    def __call__(self, x):
        return self.module(x)


class RowData(LightningDataModule):
    """Rows of two points to train on, of five to validate on."""

    num_classes = 3

    def rows(self, points):
        return DataLoader(TensorDataset(torch.randn(8, points, 2), torch.arange(8) % 3), batch_size=4)

    def train_dataloader(self):
        return self.rows(2)

    def val_dataloader(self):
        return self.rows(5)


def fitted(folder, caplog, **options):
    module = Rows(3, moe=MOE, dropout=0.0)
    made = Trainer(
        max_epochs=1, logger=MetricsCSV(str(folder)), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", log_every_n_steps=1, **options,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "apps"):
        made.fit(module, RowData())
    return next(message for message in caplog.messages if "MFLOPs" in message)


# A point: 2 * (2*8 + 8*3) of the ends, 2 * 8*4 of the router, 2 * 2 * 2*8*8 of two experts: 80 + 64 + 512 = 656.
def test_a_training_and_a_comparison_count_the_same_and_say_of_what(tmp_path, caplog):
    printed = fitted(tmp_path, caplog)
    assert printed.endswith("MFLOPs a row of 5 points (forward)")
    sparse = find_systems(Rows(3, moe=MOE), next(iter(RowData().val_dataloader())))[0]
    assert sparse.cost.flops_per_example == 5 * 656
    assert sparse.cost.unit == "a row of 5 points"
    assert f"{megaflops(sparse.cost.flops_per_example)} MFLOPs" in printed
    assert "3280.0" in (tmp_path / "metrics.csv").read_text()


def test_without_validation_the_training_batch_is_counted(tmp_path, caplog):
    assert fitted(tmp_path, caplog, limit_val_batches=0).endswith("0.00131 MFLOPs a row of 2 points (forward)")


def test_a_capacity_does_not_hide_cost_in_a_training(tmp_path, caplog):
    module = Rows(3, moe=core.MoEConfig(num_experts=4, capacity_factor=1.0, expert=core.FFN(hidden_dim=8, bias=True)))
    batch = next(iter(RowData().val_dataloader()))
    cost = measure_cost(module, batch, ["net.3"])
    assert (cost.flops_per_example, cost.replaced_flops_per_example) == (5 * 656, 5 * 576)
    evaluated = measure_cost(module, batch, ["net.3"], as_evaluated=True)
    assert evaluated.flops_per_example < 5 * 656
    assert evaluated.replaced_flops_per_example < 5 * 576


def test_examples_are_counted_by_the_first_argument_with_a_length():
    class Batch:
        def __len__(self) -> int:
            return 7

    assert num_examples((torch.zeros(3, 2), Batch())) == 3
    assert num_examples(({"a": 1}, [1, 2], "abc", torch.tensor(1.0), Batch())) == 7
    with pytest.raises(ValueError, match="gives dict, which has no length to count examples by"):
        num_examples(({"a": torch.zeros(3)},))


def test_counting_changes_neither_generators_nor_mode():
    module = TinyModule(3, moe=MOE).train()
    state = torch.get_rng_state()
    cost = measure_cost(module, (torch.randn(5, 2, generator=torch.Generator()),))
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert cost.num_params == sum(p.numel() for p in module.parameters())
    # Of four experts with 2 * 64 weights and 16 biases each, a token touches two.
    assert cost.num_params - cost.active_params == 2 * (2 * 64 + 16)
    assert cost.unit == "an example"


def test_small_costs_keep_three_digits():
    assert [megaflops(flops) for flops in (0, 3390, 999_999, 1e6, 6.6e6, 1.2345e9)] == [
        *("0.00", "0.00339", "1"),
        *("1.00", "6.60", "1,234.50"),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_tasks_count_as_independent_whatever_their_untrained_routers_agree_on(seed):
    torch.manual_seed(seed)
    config = core.MMoE(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.MLP((8,)))
    net = torch.nn.Sequential(config.build(6, num_tasks=2))
    counted = measure_cost(Called(net), torch.randn(32, 6), ["0"])
    # Two routers of 2 * 6*4; 4 (1 - 1/2 * 1/2) = 3 of 4 experts, each 2 * 6*8.
    assert counted.flops_per_example == counted.replaced_flops_per_example == 2 * 48 + 3 * 96
    assert measure_cost(Called(net), torch.randn(32, 6), as_evaluated=True).flops_per_example != 384
    alone = torch.nn.Sequential(config.build(6, num_tasks=1))
    assert measure_cost(Called(alone), torch.randn(32, 6), ["0"]).replaced_flops_per_example == 48 + 2 * 96


# A token: 2 * 8*4 of a router, 2 * 2 * 2*8*8 of two experts, of which a capacity of 0.5 leaves half.
@pytest.mark.parametrize("factor, second", [(0.5, 64 + 256), (None, 64 + 512)])
def test_layers_that_share_experts_count_by_their_own_capacity(factor, second):
    net = torch.nn.Sequential(replace(MOE, capacity_factor=0.5).build(8), replace(MOE, capacity_factor=factor).build(8))
    net[1].experts = net[0].experts
    counted = measure_cost(Called(net), torch.randn(4, 5, 8), ["1"])
    assert counted.flops_per_example == 5 * (64 + 256 + second)
    assert counted.replaced_flops_per_example == 5 * second
