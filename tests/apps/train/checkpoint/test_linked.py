"""A module is made again by its checkpoint alone."""

from __future__ import annotations

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
