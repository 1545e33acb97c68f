"""Adopted experts split over two ranks, against one process with both ranks' tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from families import IDS, PRELOAD, adapted, check_gradients, error, first_layer, made
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from two_ranks import on_two_ranks

import core
from core.parallel import shard_experts
from core.parallel.parts import whole_of

FAMILIES = ["GptOss", "DeepseekV3", "Llama4", "Olmoe", "Mixtral, adapters"]
X = torch.cat([IDS[:1], IDS[:1].flip(1)])


def outcome(net, ids):
    logits = net(input_ids=ids).logits
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def net_of(name):
    family, _, adapters = name.partition(", ")
    net = core.adopt(made(family))
    return (adapted(net, "experts", "router") if adapters else net).eval()


def on_ranks(rank):
    found = {}
    for name in FAMILIES:
        net = net_of(name)
        places = shard_experts(net, init_device_mesh("cpu", (2,)))
        logits, grads = outcome(net, X[rank : rank + 1])
        whole = {}
        for key, grad in grads.items():
            if isinstance(grad, DTensor):
                whole[key] = whole_of(grad)
            else:
                whole[key] = grad.clone()
                dist.all_reduce(whole[key])
        held = {n: tuple(p.to_local().shape) for n, p in net.named_parameters() if isinstance(p, DTensor)}
        state = {key: whole_of(t) for key, t in net.state_dict().items()}
        found[name] = (places, logits, whole, held, state)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(on_ranks, tmp_path_factory.mktemp("ranks"), PRELOAD)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_compute_as_one_process(name, ranks):
    net = net_of(name)
    names = list(net.state_dict())
    logits, grads = outcome(net, X)
    found = [rank[name] for rank in ranks]
    E = first_layer(net).num_experts
    assert set(found[0][0].values()) == {f"{E // 2} of {E} experts on each of 2 ranks"}
    assert error(torch.cat([own[1] for own in found]), logits) < 1e-5
    check_gradients(found[0][2], grads)
    assert found[0][3]
    assert all(shape[0] == E // 2 for shape in found[0][3].values())
    assert list(found[0][4]) == names  # what is saved is whole
    for key, tensor in net.state_dict().items():
        assert torch.equal(found[1][4][key], tensor), key
