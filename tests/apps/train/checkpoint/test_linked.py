"""A module is made again by its checkpoint alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_app import TinyData, TinyModule
from trainings import MOE, fit, load, trainer

from apps.train.optim.optimizers import OptimizerConfig


def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path):
    module = TinyModule(3, width=10, moe=MOE, optimizer=OptimizerConfig(lr=0.02))
    fit(module, tmp_path)
    path = tmp_path / "last.ckpt"
    assert load(path)["hyper_parameters"]["moe"]["num_experts"] == 4
    again = TinyModule.load_from_checkpoint(path)
    assert again.optimizer_config == OptimizerConfig(lr=0.02)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
    assert TinyModule.load_from_checkpoint(path, dropout=0.7).net[2].p == 0.7


def test_arguments_that_are_damaged_are_one_line():
    checkpoint = {"hyper_parameters": {"num_classes": [3]}, "state_dict": {}}
    with pytest.raises(ValueError, match=r"^few\.ckpt makes no TinyModule, so it is damaged or of .*: TypeError: "):
        TinyModule.restored(checkpoint, "few.ckpt")


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("width", 10**12, r"net.0.weight is \(8, 2\) there and \(1000000000000, 2\) here"),
        ("width", 10**18, "overflow"),
        ("moe", dataclasses.replace(MOE, num_experts=10**9), r"\(1000000000, "),
    ],
)
def test_sizes_that_a_checkpoint_does_not_have_are_not_made(argument, value, problem):
    module = TinyModule(3, moe=MOE)
    module.keep_arguments({argument: value})
    checkpoint = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    with pytest.raises(ValueError, match=rf"^big\.ckpt does not fit a TinyModule of its arguments: .*{problem}"):
        TinyModule.restored(checkpoint, "big.ckpt")


def test_more_layers_than_a_checkpoint_has_are_not_made():
    class ManyLayers(TinyModule):
        def __init__(self, num_layers: int = 1) -> None:
            super().__init__(3)
            self.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(num_layers))

    module = ManyLayers()
    checkpoint = {"hyper_parameters": {"num_layers": 10**12}, "state_dict": module.state_dict()}
    with pytest.raises(ValueError, match=r": the checkpoint has \d+ tensors, and the model over \d+$"):
        ManyLayers.restored(checkpoint, "deep.ckpt")


class FewOptions(TinyModule):
    """Takes none of what ``SparseModule`` and ``TinyModule`` could do besides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


def test_what_a_module_does_not_take_is_not_in_its_checkpoint(tmp_path):
    module, run = FewOptions(3), trainer(tmp_path)
    run.fit(module, TinyData())
    run.save_checkpoint(tmp_path / "few.ckpt")
    assert dict(module.hparams) == {"num_classes": 3}
    again = FewOptions.load_from_checkpoint(tmp_path / "few.ckpt")
    assert torch.equal(again.net[0].weight, module.net[0].weight)
