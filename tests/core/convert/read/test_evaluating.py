"""A model is in evaluation for a while, and each part is afterwards as it was."""

from __future__ import annotations

import pytest
from torch import nn

from core.convert.read.calls import evaluating


def test_each_part_has_its_mode_again_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()  # a frozen part of a model in training
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(ValueError, match="wrong"), evaluating(model):
        raise ValueError("wrong")
    assert [module.training for module in model.modules()] == [True, True, False]
