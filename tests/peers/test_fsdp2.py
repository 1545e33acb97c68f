"""torch's FSDP2: a rank that is alone among the shards divides gradients twice, and knows no inference mode."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def test_one_shard_divides_forced_sums_twice_and_knows_no_inference_mode(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        # ``apps.train.lightning_internals.prepare_for_fsdp`` leaves inference mode out.
        with torch.inference_mode(), pytest.raises(RuntimeError, match="Inference tensors do not track version"):
            layer()(torch.ones(1, 2))
        # Each of the two weights has the gradient 1, divided by a factor of 4. ``core.parallel.average_experts`` forces
        # no sum there.
        for forced, gradient in ((False, 1 / 4), (True, 1 / 16)):
            linear = layer()
            linear.set_gradient_divide_factor(4.0)
            linear.set_force_sum_reduction_for_comms(forced)
            linear(torch.ones(1, 2)).sum().backward()
            gradients = linear.weight.grad.full_tensor().tolist()
            if forced and gradients == [[1 / 4, 1 / 4]]:
                pytest.skip("torch divides once")
            assert gradients == [[gradient, gradient]]
    finally:
        dist.destroy_process_group()


def layer() -> nn.Linear:
    linear = nn.Linear(2, 1, bias=False)
    fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
    return linear
