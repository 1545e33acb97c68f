"""Experts split over two gloo ranks, and experts sharded by FSDP2, against one process with both ranks' tokens.

One spawn runs every scenario; each test reads the outcome of its own.
"""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_ranks import WORLD, on_two_ranks

import core
from core import FFN, MLP, PEER, PLE, SMES, LoRA, Merge, MMoE, MoEConfig, SoftSlots, TokenChoice, Zero, active_params
from core.parallel import AllToAllDispatcher, needs_all_ranks, refusal, shard_experts

D = 6
Outcome = dict[str, Tensor]

ROUTED = {
    "ffn": MoEConfig(4, TokenChoice(2), FFN(5, bias=True)),
    "gates on the input": MoEConfig(4, TokenChoice(2, gates_on="input"), FFN(5, bias=True)),
    "shared experts": MoEConfig(4, TokenChoice(2), core.SwiGLU(5), num_shared_experts=1),
    "mlp": MoEConfig(4, TokenChoice(2), MLP((5, D), norm="layer")),
    "dropped pairs": MoEConfig(4, TokenChoice(2), FFN(5), capacity_factor=0.5, group="sequence"),
    "tasks": MMoE(4, FFN(5), TokenChoice(2)),
    "tasks, gates on the input": MMoE(4, MLP((5,)), TokenChoice(2, gates_on="input")),
    "one selection": MMoE(4, MLP((5,)), TokenChoice(2), "shared"),
    "a joint choice": SMES(4, MLP((5,)), 1, 1),
    "experts without tokens": MoEConfig(32, TokenChoice(1), FFN(5, bias=True)),
    "low rank": MoEConfig(4, TokenChoice(2), LoRA(2)),
    "patches": MoEConfig(4, TokenChoice(1), core.Convolution(2, patch_size=2)),
    "output bias": MoEConfig(4, TokenChoice(2), core.GEGLU(5), output_bias=True),
    "attention": MoEConfig(4, TokenChoice(2), core.AttentionExperts(2, 3)),
}
STATIC = {
    "static": MoEConfig(
        4, TokenChoice(2), FFN(5, bias=True), capacity_factor=0.5, group="sequence", num_shared_experts=1
    ),
    "static, groups of 8 tokens": MoEConfig(4, TokenChoice(2), FFN(5), capacity_factor=0.75, group=8),
    "static, experts choose": MoEConfig(4, core.ExpertChoice(1.0), FFN(5)),
}
SHARES = {"even": (2, 2), "uneven": (3, 1), "one rank has all": (4, 0)}
"""Sequences of each rank."""
DENSE = {
    "merged": MoEConfig(4, Merge(), FFN(5, bias=True)),
    "merged mlp": MoEConfig(4, Merge(), MLP((5, D))),
    "dense gates": MMoE(4, MLP((5, 3)), self_gate=1, feature_gate=2),
    "experts of domains": MMoE(4, FFN(5), num_domain_experts=1),
    "levels": PLE(2, MLP((5,)), num_levels=2),
}
CASES = [("even", name) for name in (*ROUTED, *STATIC)] + [("fsdp", name) for name in (*ROUTED, *DENSE)]
CASES += [(share, name) for share in ("uneven", "one rank has all") for name in ("ffn", "one selection", "attention")]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = {**ROUTED, **STATIC, **DENSE}[name]
    if isinstance(config, MoEConfig):
        return config.build(D)
    return config.build(D, 2, 2 if config.num_domain_experts else 0)


def wrapped(kind: str, name: str, mesh: DeviceMesh) -> nn.Module:
    layer = build(name)
    if kind in SHARES:
        shard_experts(layer, mesh, static=name in STATIC)
        return layer
    for part in layer.modules():
        if isinstance(part, core.Experts):
            fully_shard(part, mesh=mesh)
    return fully_shard(layer, mesh=mesh)


def step(layer: nn.Module, rank: int, factor: float = 1.0, share: tuple[int, ...] = (2, 2)) -> Outcome:
    """The output and its tokens' gradient for this rank's sequences, all of them for -1; the parameters' gradients."""
    torch.manual_seed(1)
    x, dy, domains = torch.randn(4, 4, D), torch.randn(4, 4, D), torch.tensor([0, 1, 1, 0])
    if rank >= 0:
        x, dy, domains = (t.split(share)[rank] for t in (x, dy, domains))
    x = x.clone().requires_grad_()
    y = layer(x, core.RoutingContext(domain_ids_B=domains))
    tasks = y.shape[0] if y.ndim == 4 else 1
    weights = torch.arange(1.0, tasks + 1)[:, None, None, None] * dy[None, ..., : y.shape[-1]]
    (y.view(tasks, *y.shape[-3:]) * weights).sum().mul(factor).backward()
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x.grad": x.grad / factor, **gradients}


def on_a_rank(kind: str, name: str, rank: int, mesh: DeviceMesh) -> Outcome:
    # FSDP averages the ranks' gradients, where the loss is their sum.
    layer = wrapped(kind, name, mesh)
    outcome = step(layer, rank, WORLD if kind == "fsdp" else 1, SHARES.get(kind, (2, 2)))
    for key, parameter in layer.named_parameters():
        outcome.setdefault(key, torch.zeros_like(parameter))  # of a rank without tokens
    for key, grad in outcome.items():
        if hasattr(grad, "full_tensor"):
            outcome[key] = grad.full_tensor()
        elif key not in ("y", "x.grad"):  # of a parameter that each rank has: the sum over their tokens
            dist.all_reduce(grad)
    return outcome


REFUSED = {
    "merged experts": (MoEConfig(4, Merge(), FFN(5)), "the layer, MergedMoE, has experts that cannot be sharded"),
    "soft slots": (MoEConfig(4, SoftSlots(2), FFN(5)), "the layer, SoftMoE, has experts that cannot be sharded"),
    "dense gates": (MMoE(4, FFN(5)), "the layer, MultiGateMoE, has experts that cannot be sharded"),
    "neurons": (MoEConfig(16, core.ProductKeys(2), PEER()), "the layer, NeuronMoE, has experts that cannot be sharded"),
    "three experts": (MoEConfig(3, TokenChoice(2), FFN(5)), r"has 3 experts .*, which 2 ranks do not divide"),
    "several kinds": (
        MoEConfig(4, TokenChoice(2), core.Mixed((FFN(5), Zero()), (2, 2))),
        r"has experts of several kinds \(MixedExperts\), which are not sharded",
    ),
    "statistics": (MoEConfig(4, TokenChoice(2), MLP((5, D), norm="batch")), "has MLPExperts with statistics"),
    "no layer": (None, "Linear has no MoE layer whose experts could be sharded"),
}


def message(config: object, mesh: DeviceMesh) -> str:
    """Return the error of dividing the experts of a layer, which stays as it was."""
    layer = nn.Linear(D, D) if config is None else config.build(D, *(() if isinstance(config, MoEConfig) else (2,)))
    parameters = list(layer.parameters())
    try:
        shard_experts(layer, mesh)
    except ValueError as error:
        assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
        return str(error)
    return ""


def message_of(dispatcher: AllToAllDispatcher) -> str:
    layer = build("ffn")
    layer.dispatcher = dispatcher
    try:
        layer(torch.randn(1, 2, D))
    except ValueError as error:
        return str(error)
    return ""


def facts(rank: int, mesh: DeviceMesh) -> dict[str, object]:
    """Return the figures of a layer whose experts are split, and the messages where they cannot be."""
    layer = build("ffn")
    whole, where = layer.experts.w_in[2 * rank].detach().clone(), shard_experts(layer, mesh)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    first = layer.experts.weights_of(0)["w_in"]
    kept = torch.equal(first, whole)
    layer.experts.init_each(nn.init.ones_)
    dropless = build("ffn")
    shard_experts(dropless, mesh, static=True)
    with pytest.raises(ValueError, match="static=True needs a capacity: give the layer a capacity_factor"):
        dropless(torch.randn(1, 2, D))
    copies = [copy.deepcopy(layer.dispatcher), pickle.loads(pickle.dumps(layer.dispatcher))]
    return {
        "where": where,
        "experts": (layer.num_experts, layer.experts.num_experts, layer.experts.num_local_experts),
        "parameters": (layer.all_expert_params(), active_params(layer), active_params(build("ffn"))),
        "shapes": shapes == {name: tuple(tensor.shape) for name, tensor in build("ffn").state_dict().items()},
        "first is kept": kept,
        "started": bool(layer.experts.w_in.to_local().eq(1).all() and not layer.experts.b_in.to_local().any()),
        "refused": {name: message(config, mesh) for name, (config, _) in REFUSED.items()},
        "copies": [message_of(c) for c in copies],
        "needs all ranks": (needs_all_ranks(layer), needs_all_ranks(build("ffn"))),
    }


def work(rank: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (WORLD,))
    return {"outcomes": {case: on_a_rank(*case, rank, mesh) for case in CASES}, "facts": facts(rank, mesh)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind, name", CASES)
def test_two_ranks_equal_one_process_in_output_and_gradients(ranks, kind, name):
    expected, outcomes = step(build(name), -1), [r["outcomes"][kind, name] for r in ranks]
    sequences = -3 if expected["y"].ndim == 4 else 0  # (t, B, S, H) of a layer of tasks, else (B, S, D)
    for key, tensor in expected.items():
        if key in ("y", "x.grad"):
            parts = [torch.cat([f[key] for f in outcomes], sequences if key == "y" else 0)]
        else:
            parts = [f[key] for f in outcomes]
        for part in parts:
            torch.testing.assert_close(part, tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_a_split_layer_counts_the_experts_of_both_ranks(ranks):
    # An expert of D = 6, F = 5 with biases has 2 * 30 + 5 + 6 = 71 parameters, the gate 4 * 6; a token takes 2 of 4.
    for known in (r["facts"] for r in ranks):
        assert (known["experts"], known["parameters"]) == ((4, 4, 2), (4 * 71, 2 * 71 + 24, 2 * 71 + 24))
        assert known["shapes"]
        assert known["first is kept"]
        assert known["started"]
        assert known["needs all ranks"] == (True, False)
        assert all("the dispatcher is a copy, which knows no ranks" in said for said in known["copies"])
        assert known["where"] == {"": "2 of 4 experts on each of 2 ranks"}


def test_experts_that_cannot_be_divided_are_refused_and_stay_whole(ranks):
    for name, (_, said) in REFUSED.items():
        for known in (r["facts"] for r in ranks):
            assert re.search(said, known["refused"][name]), name
    layer = MoEConfig(4, TokenChoice(2), FFN(6)).build(D)
    assert refusal(layer, 2) is None
    assert refusal(layer, 4, hidden=3) is None
    assert refusal(layer, 3) == "the layer has 4 experts (FFNExperts), which 3 ranks do not divide"
    units = "the layer has experts of 6 hidden units (FFNExperts.w_in), which 4 ranks do not divide"
    assert refusal(layer, 2, hidden=4) == units
    soft = MoEConfig(4, SoftSlots(1), FFN(6)).build(D)
    assert refusal(soft, 1) == "the layer, SoftMoE, has experts that cannot be sharded over ranks"
