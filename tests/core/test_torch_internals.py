"""The private parts of torch that the engine uses, and what ``import core`` loads; a version that changes one fails."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from core import torch_internals as internals
from core.kernels.triton_ops.environment import missing


def test_a_profiler_and_the_forward_that_a_checkpoint_repeats_are_seen():
    assert not internals.is_profiled()
    with profile(activities=[ProfilerActivity.CPU]):
        assert internals.is_profiled()
    assert not internals.is_profiled()
    seen = []

    def forward(x):
        seen.append(internals.in_backward())
        return x * x

    checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_transforms_are_seen_inside_only():
    seen = []

    def look(x):
        try:
            internals.check_not_mapped(x)
            seen.append((internals.is_transformed(), False))
        except ValueError:
            seen.append((internals.is_transformed(), True))
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(torch.ones(3, 2))
    assert seen == [(False, False), (True, False), (True, True), (True, True)]
    with forward_ad.dual_level():
        assert internals.is_transformed()


def test_a_flop_counter_is_a_mode_and_fake_tensors_and_storages_are_known():
    assert not internals.is_watched()
    assert not internals.is_in_torch_dispatch_mode()
    with FlopCounterMode(display=False):
        assert internals.is_watched()
        assert internals.is_in_torch_dispatch_mode()
    seen = []
    make_fx(lambda x: seen.append(type(x)) or x + 1, tracing_mode="fake")(torch.ones(2))
    assert seen == [internals.FakeTensor]
    # Storages are told apart on the meta device.
    x, y = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert internals.storage_id(x) == internals.storage_id(x[2:])
    assert internals.storage_id(x) != internals.storage_id(y)


def test_a_view_of_a_parameter_is_counted_without_gradients():
    token, linear = nn.Parameter(torch.ones(1, 1, 4)), nn.Linear(4, 3)
    with torch.no_grad(), internals.flop_counter() as counter:
        linear(token.expand(5, 1, 4))
    assert counter.get_total_flops() == 2 * 5 * 4 * 3


def test_feed_forward_and_onednn_multiply_as_torch_does():
    layer, x = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), torch.randn(3, 4)
    torch.testing.assert_close(internals.feed_forward(layer, x), layer.linear2(torch.relu(layer.linear1(x))))
    linear, pack = internals.onednn("linear_pointwise"), internals.onednn("reorder_linear_weight")
    if linear is None:
        pytest.skip("torch is built without oneDNN")
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for form in (weight, pack(weight)):
        y = linear(x, form, bias, "none", [], "")
        torch.testing.assert_close(y, x @ weight.T + bias)


def test_the_fused_attention_is_attention_and_has_a_backward():
    q, k, v = torch.randn(3, 1, 2, 4, 8, requires_grad=True).unbind()
    backward = internals.fused_attention("flash_attention_for_cpu_backward")
    y = internals.fused_attention("flash_attention_for_cpu")(q, k, v)[0]
    torch.testing.assert_close(y, torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        y.sum().backward()
    assert backward._qualified_op_name in {event.name for event in seen.events()}
    # The other one differentiates its mask.
    q, k, v = torch.empty(3, 1, 2, 4, 8, device="meta").unbind()
    mask = torch.empty(1, 2, 4, 4, device="meta", requires_grad=True)
    y = internals.fused_attention("efficient_attention")(q, k, v, mask, True, 0.0, False)[0]
    assert y.shape == (1, 2, 4, 8)
    assert y.requires_grad
    # The fused recurrent layer is given inputs and weights first.
    first = internals.fused_recurrent().default._schema.arguments[:2]
    assert [(a.name, str(a.type)) for a in first] == [("input", "Tensor"), ("weight", "List[Tensor]")]


def test_a_rank_has_its_part_of_a_divided_tensor():
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))  # rank 2 is the first of the second row
        placed = internals.local_place(torch.Size((6, 4)), mesh, (Shard(0), Shard(1)))
        assert placed == (slice(3, 6), slice(0, 2))
        assert internals.one_axis(mesh).mesh.tolist() == [0, 1, 2, 3]
    finally:
        dist.destroy_process_group()


def test_an_exchange_of_one_rank_gives_back_rows_and_gradients():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.tensor([[1.0], [2.0]], requires_grad=True)
        y = internals.all_to_all(x, [2], [2], dist.group.WORLD)
        (y * torch.tensor([[3.0], [4.0]])).sum().backward()
        assert y.tolist() == [[1.0], [2.0]]
        assert x.grad.tolist() == [[3.0], [4.0]]
    finally:
        dist.destroy_process_group()


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
