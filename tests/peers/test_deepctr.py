"""DeepCTR-Torch's MMOE and PLE beside ours, gates with hidden layers too: the same outputs and gradients.

Version seen: 0.3.0. pip install --target peers --no-deps deepctr-torch
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import check_same, load
from torch import Tensor

import core


def models() -> Any:
    """Import the peer without the thread in which it asks for its newest version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("threading.Thread.start", lambda thread: None)
        return pytest.importorskip("deepctr_torch.models"), pytest.importorskip("deepctr_torch.inputs")


deepctr, inputs = models()

D, T, TASKS, EXPERT = 7, 30, 2, (12, 8)


def peer(name: str, hidden_dims: tuple[int, ...] = (), **options: Any) -> Any:
    """Return the peer's model on D numbers an example, with random weights in float64."""
    model = getattr(deepctr, name)(
        [inputs.DenseFeat("x", D)],
        expert_dnn_hidden_units=EXPERT,
        gate_dnn_hidden_units=hidden_dims,
        tower_dnn_hidden_units=(3,),
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.double().eval()


def before_towers(model: Any, x_TD: Tensor) -> Tensor:
    """Return what each task's tower reads, (t, T, D_out)."""
    seen: list[Tensor] = []
    for tower in model.tower_dnn:
        tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x_TD)
    return torch.stack(seen)


def mlps(prefix: str, experts: list[Any], read: Any) -> dict[str, Tensor]:
    """Return networks of linear layers as ``MLP`` experts, or as the hidden layers of gates."""
    weight, bias = ("w", "b") if prefix.endswith("experts") else ("hidden_weight", "hidden_bias")
    weights = {}
    for i in range(len(experts[0].linears)):
        weights[f"{prefix}.{weight}_{i}"] = torch.stack([read(e.linears[i].weight).mT for e in experts])
        weights[f"{prefix}.{bias}_{i}"] = torch.stack([read(e.linears[i].bias) for e in experts])
    return weights


def mmoe_layout(model: Any, read: Any) -> dict[str, Tensor]:
    hidden = mlps("router", list(model.gate_dnn), read) if model.gate_dnn_hidden_units else {}
    return {
        "router.weight": torch.stack([read(gate.weight) for gate in model.gate_dnn_final_layer]),
        **hidden,
        **mlps("experts", list(model.expert_dnn), read),
    }


def ple_layout(model: Any, read: Any) -> dict[str, Tensor]:
    """A gate's rows are of the task's experts first, and ours of the shared ones; the last level's gate of the shared
    representation is used by nobody, and ours lacks it."""
    own, weights = model.specific_expert_num, {}
    for level in range(model.num_levels):
        ours, is_last = f"router.routers.{level}", level + 1 == model.num_levels
        gates = [read(gate.weight) for gate in model.specific_gate_dnn_final_layer[level]]
        weights[f"{ours}.weight"] = torch.stack([gate.roll(-own, 0) for gate in gates])
        if not is_last:
            shared = read(model.shared_gate_dnn_final_layer[level].weight)
            weights[f"{ours}.shared_weight"] = shared.roll(-own * TASKS, 0)
        if model.gate_dnn_hidden_units:
            hidden = [gate for (gate,) in model.specific_gate_dnn[level]]
            weights |= mlps(ours, hidden if is_last else [*hidden, model.shared_gate_dnn[level]], read)
        experts = [*model.shared_experts[level][0], *(e for task in model.specific_experts[level] for e in task)]
        for name, weight in mlps("experts", experts, read).items():
            weights[name.replace("experts", f"experts.{level}", 1)] = weight
    return weights


def check_equal(model: Any, config: core.MultiGateConfig, layout: Any) -> None:
    layer = config.build(D, TASKS).double().eval()
    load(layer, layout(model, lambda p: p.detach()))
    check_same(layer, model, layout, torch.randn(T, D).double(), layer, lambda x_TD: before_towers(model, x_TD))


@pytest.mark.parametrize("hidden_dims", [(), (6, 5)])
def test_mmoe_is_theirs(hidden_dims):
    config = core.MMoE(4, core.MLP(EXPERT), gate_hidden_dims=hidden_dims)
    check_equal(peer("MMOE", hidden_dims, num_experts=4), config, mmoe_layout)


@pytest.mark.parametrize(("num_levels", "hidden_dims"), [(1, (6,)), (3, ()), (3, (6, 5))])
def test_ple_is_theirs(num_levels, hidden_dims):
    config = core.PLE(2, core.MLP(EXPERT), num_task_experts=2, num_levels=num_levels, gate_hidden_dims=hidden_dims)
    model = peer("PLE", hidden_dims, num_levels=num_levels, shared_expert_num=2, specific_expert_num=2)
    check_equal(model, config, ple_layout)


def test_their_ple_builds_as_many_shared_experts_as_a_task_has():
    # Of one shared and three task experts it makes three shared ones, of which two compute nothing; of three shared and
    # one task expert it makes one and looks for three.
    few = peer("PLE", shared_expert_num=1, specific_expert_num=3)
    if len(few.shared_experts[0][0]) == 1:
        pytest.skip("PLE: the installed version builds the right number")
    assert len(few.shared_experts[0][0]) == 3
    assert few(torch.randn(T, D).double()).shape == (T, TASKS)
    many = peer("PLE", shared_expert_num=3, specific_expert_num=1)
    with pytest.raises(IndexError):
        many(torch.randn(T, D).double())
    assert core.PLE(3, num_task_experts=1).build(D, TASKS)(torch.randn(T, D)).shape[:2] == (TASKS, T)
