"""What ``import core`` loads beside torch, and that what it leaves out is there when it is needed."""

from __future__ import annotations

import subprocess
import sys

import torch

from core.kernels.triton_ops.environment import missing

LOADED = """
import sys, torch
before = set(sys.modules)
import core
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(added - sys.stdlib_module_names - {"core"}), "torch._dynamo" in set(sys.modules) - before)
layer = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8)).build(4)
x = torch.randn(1, 3, 4)
layer(x).sum().backward()
# 3 tokens through the gate, 2 * 4 * 4 each, and 2 experts of two products of 2 * 4 * 8.
print(core.count_flops(layer, x))
"""
COUNTED = """
import core, torch
layer, x = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8)).build(4), torch.randn(1, 3, 4)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(x)
print(counter.get_total_flops())
"""


def lines(script: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")


def test_core_loads_no_compiler_and_no_library_that_torch_does_not_load():
    assert lines(LOADED)[:2] == ["[] False", str(3 * (32 + 2 * 128))]


def test_a_flop_counter_of_the_users_own_knows_the_experts():
    assert lines(COUNTED)[0] == str(3 * (32 + 2 * 128))


def test_a_compiler_takes_the_answer_for_constant_as_its_own_decorator_says():
    assert vars(torch.compiler.assume_constant_result(lambda: None)).items() <= vars(missing).items()
