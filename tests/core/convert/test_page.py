"""The Python of docs/fewer_experts.md runs, in its order."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from places import ROOT
from shrinking import D, tokens
from torch import nn

import core
from core import FFN, MoEConfig, RoutingContext, Task


class OfTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoEConfig(4, Task(3, 2), FFN(6)).build(D)

    def forward(self, x):
        return self.moe(x, RoutingContext(task_ids_B=torch.ones(len(x), dtype=torch.int64)))


def test_the_page():
    page = (ROOT / "docs" / "fewer_experts.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"core": core, "copy": copy, "model": OfTasks(), "batches": [{"x": tokens()}] * 2}
    nn.init.normal_(names["model"].moe.router.gate.weight)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["model"].moe.num_experts == 2
    torch.testing.assert_close(names["one_task"](tokens()), names["model"](tokens()), rtol=1e-5, atol=1e-6)
