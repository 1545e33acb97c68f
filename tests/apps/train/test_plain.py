"""Configs as plain values, and back."""

from __future__ import annotations

import pytest
from trainings import MOE

import core
from apps.train.optimizers import OptimizerConfig
from apps.train.plain import from_plain, to_plain


def test_plain_and_back():
    for value in (MOE, OptimizerConfig(lr=0.3), {"a": [1, None, "x"]}, core.MoEConfig(2, expert=core.SwiGLU())):
        plain = to_plain(value)
        assert from_plain(plain) == value
    with pytest.raises(ValueError, match=r"'nowhere\.Thing' is not a registered config class"):
        from_plain({"class_path": "nowhere.Thing", "init_args": {}})
    with pytest.raises(ValueError, match=r"\'os\.system\' is not a registered config class"):
        from_plain({"class_path": "os.system", "init_args": {}})
