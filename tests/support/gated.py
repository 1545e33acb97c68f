"""Multi-gate layers by name, for the tests of all of them, and one step of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import core
from core import (
    CGC,
    FFN,
    MLP,
    PLE,
    SMES,
    STAR,
    DSelectK,
    ExpertChoice,
    HoME,
    M3oE,
    MMoE,
    MultiGateConfig,
    NullExperts,
    OMoE,
    RankMixer,
    ReLURouting,
    RoutingContext,
    SwiGLU,
    Threshold,
    TokenChoice,
)

D, TASKS, DOMAINS = 9, 3, 4
HOME = {"expert": MLP((6,), "silu", "batch"), "feature_gate": 2, "self_gate": 2}
DENSE: dict[str, MultiGateConfig] = {
    "mmoe": MMoE(5, MLP((7, 6))),
    "omoe": OMoE(5, MLP((6,))),
    "cgc": CGC(3, MLP((6,)), 2),
    "ple": PLE(2, MLP((6,)), 2, 3),
    "ple uneven": PLE(3, MLP((7, 6)), 1, 2),
    "ple without own": PLE(3, MLP((6,)), 0, 2),
    "home mmoe": MMoE(5, **HOME),
    "home ple": PLE(2, num_task_experts=2, **HOME),
    "uneven cgc": CGC(3, MLP((6,)), (2, 0, 1)),
    "uneven ple": PLE(2, MLP((6,)), (1, 3, 2), 3, gate_bias=True),
    "uneven home ple": PLE(2, num_task_experts=(0, 1, 2), **HOME),
    "one self gate": CGC(3, MLP((6,)), 0, self_gate=1),
    "ffn": MMoE(4, FFN(12, bias=True)),
    "swiglu ple": PLE(2, SwiGLU(12), 1, 2),
    "home": HoME(2, MLP((7, 6)), 2, 1, (1, 0, 1), self_gate=0),
    "gated home": HoME(1, MLP((6,), "silu", "batch"), 1, 2, (0, 1, 1), feature_gate=2, self_gate=2, gate_bias=True),
}
DOMAIN: dict[str, MultiGateConfig] = {
    "domain mmoe": MMoE(3, MLP((6,)), num_domain_experts=2),
    "domain ple": PLE(2, MLP((6,), norm="batch"), 1, 2, num_domain_experts=1, self_gate=1),
    "uneven domain ple": PLE(2, MLP((6,)), (1, 0, 2), 2, num_domain_experts=2, self_gate=1, gate_hidden_dims=(5,)),
    "domain gates": CGC(3, MLP((6,)), 1),
    "domain home": HoME(2, MLP((6,)), categories=(0, 0, 1), gate_hidden_dims=(5,)),
    "m3oe": M3oE(3, MLP((7, 6))),
    "star": STAR(1, MLP((7, 6))),
    "star of batch norms": STAR(1, MLP((6,), norm="batch"), norm=False),
    "star of layer norms": STAR(1, MLP((6,), norm="layer")),
}
SPARSE: dict[str, MultiGateConfig] = {
    "top-k": MMoE(8, MLP((6,)), TokenChoice(2)),
    "top-k of FFN": MMoE(8, FFN(12), TokenChoice(2)),
    "top-1, batch norm": MMoE(8, MLP((6,), norm="batch"), TokenChoice(1)),
    "input gates": MMoE(8, MLP((6,)), TokenChoice(2, gates_on="input")),
    "dselect-k": MMoE(8, MLP((6,)), DSelectK(2)),
    "expert choice": MMoE(8, MLP((6,)), ExpertChoice(2.0)),
    "threshold": MMoE(8, MLP((6,)), Threshold(0.2, second_expert_policy="threshold")),
    "null experts": MMoE(8, MLP((6,)), NullExperts(4, num_null_experts=8)),
    "shared top-k": MMoE(8, MLP((6,)), TokenChoice(3), "shared"),
    "shared top-k of FFN": MMoE(8, FFN(12), TokenChoice(3), "shared"),
    "shared sigmoid": MMoE(8, MLP((6,)), TokenChoice(3, score_func="sigmoid", normalize=False), "shared"),
    "shared expert choice": MMoE(8, MLP((6,)), ExpertChoice(2.0), "shared"),
    "shared dselect-k": MMoE(8, MLP((6,)), DSelectK(2), "shared"),
    "relu": MMoE(8, MLP((6,)), ReLURouting(2)),
    "smes": SMES(8, MLP((6,)), 2, 1),
    "smes of FFN": SMES(8, FFN(12), 0, 2, gate_hidden_dims=(5,), gate_bias=True),
    "smes without private": SMES(8, MLP((6,), norm="batch"), 3, 0),
}
MIXED: dict[str, MultiGateConfig] = {
    "rank mixer": RankMixer(num_tokens=3, token_dim=6, depth=2),
    "sparse rank mixer": RankMixer(3, FFN(12), ReLURouting(1), num_tokens=2, token_dim=6, depth=1),
}
ALL = DENSE | DOMAIN | SPARSE | MIXED


def build(name: str, seed: int = 0, **options) -> core.MultiGateLayer:
    """Return a layer whose gates and norms are moved away from their start."""
    config = ALL[name] if not options else type(ALL[name])(**{**vars(ALL[name]), **options})
    torch.manual_seed(seed)
    layer = config.build(D, TASKS, DOMAINS if name in DOMAIN else 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def context(name: str, B: int, valid_B: Tensor | None = None) -> RoutingContext | None:
    if name not in DOMAIN:
        return None if valid_B is None else RoutingContext(valid_BS=valid_B)
    ids = torch.randint(DOMAINS, (B,), generator=torch.Generator().manual_seed(3))
    return RoutingContext(domain_ids_B=ids, valid_BS=valid_B)


def examples(B: int, seed: int = 5) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def expert(layer_experts, e: int, x: Tensor) -> Tensor:
    """Compute expert e of MLP experts, without a norm or with a training's batch norm, layer by layer."""
    act = {"relu": torch.relu, "silu": lambda h: h * h.sigmoid()}[layer_experts.activation]
    for i in range(len(layer_experts.hidden_dims)):
        x = x @ getattr(layer_experts, f"w_{i}")[e]
        if layer_experts.norm == "batch":
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
            x = x * getattr(layer_experts, f"norm_weight_{i}")[e] + getattr(layer_experts, f"norm_bias_{i}")[e]
        else:
            x = x + getattr(layer_experts, f"b_{i}")[e]
        x = act(x)
    return x


def assert_same_with_gradients(layer: nn.Module, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """The output of a layer for ``x``, and the gradients of ``x`` and all parameters, are those of a loop over them."""
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = {"x": x, **dict(layer.named_parameters())}
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    of_layer, of_loop = (torch.autograd.grad((out * weight).sum(), [*leaves.values()]) for out in (y, expected))
    for name, grad, wanted in zip(leaves, of_layer, of_loop, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert wanted.any(), name


def copied(to: nn.Module, source: dict[str, Tensor]) -> nn.Module:
    to.load_state_dict(source)
    return to
