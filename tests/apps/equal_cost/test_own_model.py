"""What a comparison learns of a LightningModule of the user's own, counted by hand."""

from dataclasses import dataclass, replace

import pytest
import torch
from own_net import Net, Points, Unvalidated
from refusals import refused
from torch import nn

import core
from apps.compare.systems import find_systems
from apps.equal_cost.own_model import num_examples, own_model
from apps.train.cost.flops import measure_cost
from apps.train.sparsified import SparsifyConfig

# A point is one token of width 8. The network has F = 16: 4 * 8 * 16 = 512 FLOPs. The sparse one has a router of
# 2 * 8 * 4 = 64 FLOPs and K = 2 experts of 512: 1088. The network costs 32 F FLOPs, so the twin has F = 34.
# Parameters: 8 * 4 of the router and 4 * (2 * 8 * 16 + 16 + 8) of the experts: 1152. The network has 17 F + 8, and
# F = 67 gives 1147.
SECTION = SparsifyConfig("blocks.*", core.MoEConfig(4, core.TokenChoice(2)), metric="val_acc", mode="max")


@pytest.fixture
def batch() -> list[torch.Tensor]:
    return next(iter(Points().val_dataloader()))


def test_costs_and_losses_are_those_of_the_modules_own_step(batch) -> None:
    model = own_model(Net(), SECTION)
    cost = measure_cost(model, batch, model.comparison.moe_block_names)
    # The embedding has 2 * 2 * 8 = 32 FLOPs a point and the head 2 * 8 * 3 = 48.
    assert (cost.flops_per_example, cost.replaced_flops_per_example) == (1088 + 32 + 48, 1088)
    assert (cost.replaced_params, cost.num_params) == (1152, 1152 + 24 + 27)
    # A token touches the router and two experts of 280.
    assert cost.active_params == 32 + 560 + 24 + 27
    assert model.module.training
    model = own_model(Net(), SECTION)
    loss = model.training_loss(batch)
    with core.record(model.module) as tape:
        task = nn.functional.cross_entropy(model.module(batch[0]), batch[1])
    torch.testing.assert_close(loss.total, task + core.aux_loss(tape), rtol=1e-6, atol=0)
    assert loss.out.num_examples == 24


class Encoder(Net):
    """Four tokens a point in a layer of torch's, whose feed-forward network is spread over the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.embed, self.head = nn.Linear(2, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.blocks[0](self.embed(x).unflatten(1, (4, 8))).flatten(1))


def test_the_twins_cost_as_much_also_where_a_network_is_spread_over_its_block(batch) -> None:
    torch.manual_seed(0)
    dense = Net()
    systems = {system.name: system for system in find_systems(own_model(dense, SECTION), batch)}
    assert systems["dense_equal_flops"].replaced_ratio == 1.0
    assert systems["dense_equal_flops"].note == "hidden dim 16 to 34 in place of experts"
    assert systems["dense_equal_params"].params_ratio == 1147 / 1152
    assert not any(system.refused for system in systems.values())
    for baseline in own_model(dense, SECTION).comparison.baselines().values():
        torch.testing.assert_close(baseline.build().module(batch[0]), dense(batch[0]), rtol=1e-6, atol=1e-6)
    sparse, flops, params = find_systems(own_model(Encoder(), SECTION), batch)
    # A token has 4 projections of 128 FLOPs, 4 * 4 * 8 in attention, and 1088 as above: 4 tokens.
    assert (sparse.cost.replaced_flops_per_example, flops.replaced_ratio) == (4 * (512 + 128 + 1088), 1.0)
    assert not params.refused


def test_a_model_that_computes_all_experts_is_not_called_sparse_and_twins_of_one_width_are_one() -> None:
    assert own_model(Net(), SECTION).comparison.heading == "sparse"
    every = replace(SECTION, moe=core.MoEConfig(2, core.TokenChoice(2)))
    assert own_model(Net(), every).comparison.heading == "MoE, all experts"
    # One expert that every token takes costs as much by FLOPs as by parameters, but for the router.
    one = replace(SECTION, moe=core.MoEConfig(1, core.TokenChoice(1)), exact=False)
    params = own_model(Net(), one).comparison.baselines()["dense_equal_params"]
    assert params.build is None
    assert params.note.startswith("coincides with dense_equal_flops: hidden dim 16 to 16")


@pytest.mark.parametrize(("metric", "given", "expected"), [
    ("val_acc", None, "test_acc"),
    ("val/acc", None, "test/acc"),
    ("validation_loss", None, "test_loss"),
    ("accuracy", None, "accuracy"),
    ("val_acc", "acc/test", "acc/test"),
])  # fmt: skip
def test_a_test_logs_the_metric_by_the_name_of_validation_with_test_in_it(metric, given, expected) -> None:
    assert own_model(Net(), replace(SECTION, metric=metric, test_metric=given)).test_monitor == expected


def test_what_has_to_be_told_is_asked_for(batch) -> None:
    rule = r"sparsify\.metric is missing: the name under which validation logs"
    refused(rule, own_model, Net(), replace(SECTION, metric=None))
    rule = "Unvalidated has no validation_step, which a comparison needs"
    refused(rule, own_model, Unvalidated(), replace(SECTION, modules="mlp"))
    rule = "validation_step of Net needs a trainer, and a comparison counts FLOPs"
    refused(rule, find_systems, own_model(Net(asks_trainer=True), SECTION), batch)


@dataclass
class Graphs:
    num_graphs: int
    x: torch.Tensor


@pytest.mark.parametrize(("batch", "part", "expected"), [
    (torch.zeros(5, 2), None, 5),
    ([torch.zeros(5, 2), {"y": torch.zeros(5), "weight": torch.tensor(1.0)}], None, 5),
    ({"tokens": torch.zeros(5, 7), "vocabulary": torch.zeros(9)}, "tokens", 5),
    ((torch.zeros(3), torch.zeros(5)), 1, 5),
    (Graphs(5, torch.zeros(40)), "num_graphs", 5),
])  # fmt: skip
def test_the_examples_of_a_batch_are_counted(batch, part, expected) -> None:
    assert num_examples(batch, part) == expected


@pytest.mark.parametrize(("batch", "part", "rule"), [
    ((torch.zeros(3), torch.zeros(5)), None, "examples is missing: a batch is a tuple with tensors of lengths 3, 5"),
    (Graphs(5, torch.zeros(40)), None, "a batch is a Graphs with no tensor to count by"),
    ({"x": torch.zeros(5)}, "y", "examples='y' is no part of a batch with a length: the batch is a dict"),
    ((torch.zeros(3),), 4, "examples=4 is no part"),
])  # fmt: skip
def test_a_batch_whose_examples_cannot_be_counted_is_refused(batch, part, rule) -> None:
    refused(rule, num_examples, batch, part)
