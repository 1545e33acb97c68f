"""``import core`` loads little beside torch, and the parts that it leaves out are there when they are needed."""

import subprocess
import sys

import torch

from core.kernels.triton_ops.environment import missing

SCRIPT = """
import sys, torch
before = set(sys.modules)
import core
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(added - sys.stdlib_module_names - {"core"}), "torch._dynamo" in set(sys.modules) - before)
layer = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8)).build(4)
x = torch.randn(1, 3, 4)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(x)
print(counter.get_total_flops())
layer(x).sum().backward()
print(core.count_flops(layer, x))
"""


def test_core_loads_no_compiler_and_nothing_that_torch_does_not_load_and_flop_counters_know_the_experts():
    printed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    # 3 tokens through the gate, 2 * 4 * 4 each, and 2 experts of two products of 2 * 4 * 8.
    flops = str(3 * (32 + 2 * 128))
    assert printed.splitlines() == ["[] False", flops, flops]


def test_a_compiler_takes_the_answer_for_constant_as_its_own_decorator_says():
    assert vars(torch.compiler.assume_constant_result(lambda: None)).items() <= vars(missing).items()
