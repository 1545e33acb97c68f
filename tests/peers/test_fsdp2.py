"""torch's FSDP2, whose gradients a rank that is alone among the shards divides twice."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@pytest.mark.parametrize(("forced", "gradient"), [(False, 1 / 4), (True, 1 / 16)])
def test_a_forced_sum_among_one_shard_divides_by_the_factor_twice(tmp_path, forced, gradient):
    # Each of the two weights has the gradient 1, divided by a factor of 4. ``core.parallel.shard_data`` forces no sum
    # there.
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 1, bias=False)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        layer.set_gradient_divide_factor(4.0)
        layer.set_force_sum_reduction_for_comms(forced)
        layer(torch.ones(1, 2)).sum().backward()
        gradients = layer.weight.grad.full_tensor().tolist()
    finally:
        dist.destroy_process_group()
    if forced and gradients == [[1 / 4, 1 / 4]]:
        pytest.skip("torch divides once")
    assert gradients == [[gradient, gradient]]
