"""The costs of systems, counted by hand, which of them may be called equal, and which test window a seed takes."""

from dataclasses import dataclass

import pytest
import torch
from compared import experiment, offers
from lightning.pytorch.utilities import move_data_to_device
from refusals import refused

import core
from apps.compare.experiment import Experiment, arguments
from apps.compare.systems import SPARSE, check_equal, claim, find_systems, label
from apps.train.cost.flops import Cost, measure_cost


@pytest.mark.parametrize("ratio, refused", [(1.0, False), (1.049, False), (0.951, False), (1.06, True), (0.94, True)])
def test_a_name_says_what_is_claimed_and_five_percent_are_allowed(ratio, refused):
    assert [claim(f"dense_equal_{cost}") for cost in ("flops", "params")] == ["flops", "params"]
    assert claim("shared_bottom") is None
    assert label("dense_equal_flops") == "dense, equal FLOPs"
    sparse, dense = (Cost(10, 10, 9e9, replaced_flops_per_example=r * 1000, replaced_params=100) for r in (1.0, ratio))
    reason = check_equal("dense_equal_flops", sparse, dense)
    said = f"take {ratio * 1000:,.0f} FLOPs an example, the sparse model's 1,000: {ratio:.3f}"
    assert said in reason if refused else reason == ""
    assert check_equal("shared_bottom", sparse, dense) == ""


def test_cost_is_counted_by_hand(config):
    tried = experiment(config)
    model, data = tried.build("sparse")
    cost = measure_cost(model, next(iter(data.val_dataloader())), tried.replaced)
    # A point has 4 tokens: block 4 * 576; embedding 2 * 2*32 = 128; head 2 * 8*3 = 48.
    assert (cost.replaced_flops_per_example, cost.flops_per_example) == (4 * 576, 4 * 576 + 128 + 48)
    assert cost.replaced_params == 544
    # embedding 64 + 32, head 24 + 3
    assert (cost.num_params, cost.active_params) == (544 + 96 + 27, 32 + 256 + 96 + 27)
    assert model.training


# Of 576 FLOPs a token the router's 64 stay, and of the experts' 512 the training computes at most the factor's part.
@pytest.mark.parametrize("train, evaluation, flops", [(0.5, None, 64 + 256), (0.5, 2.0, 64 + 256), (None, 0.5, 576)])
def test_equal_is_the_cost_of_the_training_forward(config, train, evaluation, flops):
    factors = {"capacity_factor": train, "eval_capacity_factor": evaluation}
    given = [f"--model.moe.{name}={factor}" for name, factor in factors.items() if factor is not None]
    model, data = experiment(config, *given).build("sparse")
    torch.nn.init.zeros_(model.block.router.gate.weight)  # experts 0 and 1 take every token, and 2 and 3 stay empty
    sparse, dense = find_systems(model, next(iter(data.val_dataloader())))
    assert sparse.cost.replaced_flops_per_example == 4 * flops
    assert sparse.cost.flops_per_example == 4 * flops + 128 + 48
    assert not dense.refused
    assert (dense.replaced_ratio, model.block.router.capacity.factor) == (1.0, train)


def test_a_false_claim_is_left_out_with_its_reason(config):
    names = ("dense_equal_flops", "dense_double_equal_flops", "dense_equal_params", "centroids", "none")
    model, data = experiment(config, *offers(*names)).build("sparse")
    systems = {s.name: s for s in find_systems(model, next(iter(data.val_dataloader())))}
    assert list(systems) == ["sparse", *names]
    assert not systems["dense_equal_flops"].refused
    assert systems["dense_equal_flops"].replaced_ratio == 1.0
    assert systems["dense_double_equal_flops"].refused == (
        "not called equal: its replaced blocks take 4,608 FLOPs an example, the sparse model's 2,304: "
        "2.000 of them, and the rule is within 5%"
    )
    assert systems["dense_equal_params"].params_ratio == 1.0
    assert systems["centroids"].cost is None
    assert systems["none"].refused == "it coincides with another"


@dataclass(frozen=True)
class Points:
    """A batch that is no tuple of tensors."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Points":
        return Points(self.x.to(device), self.y.to(device))


def test_a_batch_may_be_an_object_and_a_block_may_hold_the_layers(config, monkeypatch):
    model, data = experiment(config).build("sparse")
    kind = type(model)
    x, y = next(iter(data.val_dataloader()))
    whole = measure_cost(model, (x, y), ("block",))
    monkeypatch.setattr(kind, "example_inputs", lambda self, batch: (batch,))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, batch: forward(self, batch.x))
    assert measure_cost(model, Points(x, y), ("block",)) == whole
    assert isinstance(move_data_to_device(Points(x, y), torch.device("cpu")), Points)
    # The MoE layer inside a block that the baseline has under the same name, and not under the layer's.
    monkeypatch.setattr(type(model.comparison), "moe_block_names", ("block",))
    model.block = torch.nn.Sequential(model.block)
    assert list(core.moe_layers(model)) == ["block.0"]
    systems = find_systems(model, Points(x, y))
    assert ([s.refused for s in systems], systems[1].replaced_ratio) == (["", ""], 1.0)
    monkeypatch.setattr(kind, "example_inputs", lambda self, batch: ())
    with pytest.raises(ValueError, match="example_inputs gives nothing, which has no length to count examples by"):
        measure_cost(model, Points(x, y), ())


def test_nothing_to_compare_with(config):
    model, data = experiment(config, *offers("dense_double_equal_flops")).build("sparse")
    batch = next(iter(data.val_dataloader()))
    refused("nothing to compare with: dense_double_equal_flops: not called equal", find_systems, model, batch)
    with pytest.raises(ValueError, match="baseline 'dense' is unknown: the module has dense_double_equal_flops"):
        find_systems(model, batch, ["dense"])
    model.moe, model.block = None, torch.nn.Identity()
    refused("TinyModel has no MoE layer", find_systems, model, batch)


BY_TIME = """
model: {class_path: MultiTaskRecommender}
data:
  class_path: TableData
  init_args:
    dataset: table
    train_file: rows.csv
    table: {continuous: [x], tasks: {y: {column: y}}, time: at, split: {kind: time, val: 0.25, test: 0.1, origins: 3}}
"""


@pytest.fixture
def by_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("at,x,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(80)))
    (tmp_path / "table.yaml").write_text(BY_TIME)
    return lambda *words: Experiment(arguments("table.yaml", [], ["--seed_everything", "5", *words]))


def test_each_seed_tests_the_next_window_or_that_which_is_named(by_time):
    def sizes(made, *seeds):
        return [tuple(made.build(SPARSE, seed=seed)[1].sizes().values()) for seed in seeds]

    # Of 80 rows the windows are 56-63, 64-71 and 72-79; a quarter of the rows before validate.
    made, windows = by_time(), [(42, 14, 8), (48, 16, 8), (54, 18, 8)]
    assert (sizes(made, 5, 6, 7, 8), made.num_windows) == ([*windows, windows[0]], 3)
    assert tuple(made.data().sizes().values()) == windows[0]  # that of the first seed, whose model is measured
    assert sizes(made, None) == windows[2:]  # as a fit has it
    named = by_time("--data.table.split.origin", "1")
    assert (named.num_windows, sizes(named, 5, 6)) == (1, [windows[1]] * 2)
