"""Overlays that put another router, or other experts, into a config's layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import core
from apps.equal_cost import routers

EXPERTS = """
model:
  init_args:
    moe:
      num_experts: 3
      expert:
        class_path: core.Mixed
        init_args:
          experts: [{class_path: core.FFN, init_args: {hidden_dim: 8}}, {class_path: core.Zero}]
          counts: [2, 1]
"""


def test_an_overlay_of_experts_keeps_router_and_balance(tmp_path: Path):
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    moe = core.MoEConfig(8, core.TokenChoice(1), balance=core.Balance(load_balancing=0.5))
    other = routers.with_router(moe, str(tmp_path / "experts.yaml"))
    assert other == core.MoEConfig(
        3, core.TokenChoice(1), core.Mixed((core.FFN(8), core.Zero()), (2, 1)), balance=core.Balance(load_balancing=0.5)
    )


def test_an_overlay_of_neither_is_refused(tmp_path: Path):
    path = tmp_path / "neither.yaml"
    for text in ("model: {init_args: {moe: {num_experts: 3}}}", "model: 3", "model: {init_args: {moe: {expert: 3}}}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"neither.yaml has no model.init_args.moe.router or moe.expert"):
            routers.read(str(path))
