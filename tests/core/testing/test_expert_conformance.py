"""Every kind of experts of the tree keeps the properties of experts, and a fault in one is found."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import core
from core import FFN, IA3, MLP, PEER, ClampedSwiGLU, Constant, ExpertConfig, Identity, LoRA, Mixed, Rows, SwiGLU, Zero
from core.experts.two_layers import TwoLayerConfig
from core.testing import Property, check_expert, properties

CASES: dict[str, ExpertConfig] = {
    "FFN": FFN(12),
    "FFN with bias": FFN(12, "relu", bias=True),
    "SwiGLU": SwiGLU(12),
    "GEGLU with bias": core.GEGLU(12, bias=True),
    "FFN, approximate GELU": FFN(12, "gelu_tanh"),
    "GPT-OSS": ClampedSwiGLU(12, bias=True, limit=1.0, alpha=1.702, shift=1.0),
    "DeepSeek-V4": ClampedSwiGLU(12, limit=0.5),
    "SwiGLU with a bias of its gate": ClampedSwiGLU(bias=True, limit=None),
    "GeneralFFN": core.GeneralFFN(12, "quick_gelu", gated=True, bias_gate=True, bias_out=False, dropout=0.2),
    "MLP": MLP((12, 10), dropout=0.1),
    "MLP, layer norm": MLP((12,), norm="layer"),
    "MLP, batch norm": MLP((12,), norm="batch"),
    "BatchEnsemble": core.BatchEnsemble((12, 10), dropout=0.1),
    "LoRA": LoRA(4, alpha=6.0),
    "LoRA, dropout": LoRA(3, dropout=0.2),
    "IA3": IA3(),
    "Zero": Zero(),
    "Identity": Identity(),
    "Constant": Constant(),
    "Constant, mixed in": Constant(mix=True),
    "PEER": PEER(),
    "PEER, ReLU": PEER("relu"),
    "Convolution": core.Convolution(5, columns=2, bias=True),
    "Mixed": Mixed((FFN(12), Zero(), SwiGLU(8)), (2, 1, 1)),
    "Mixed, MoE++": Mixed((FFN(12, bias=True), Identity(), Constant(mix=True), Zero()), (1, 1, 1, 1)),
    "Mixed, low rank": Mixed((LoRA(2, alpha=3.0), IA3()), (2, 2)),
}
COMPILED = ("FFN", "MLP", "LoRA", "Mixed")
EXPORTED = ("GeneralFFN", "IA3", "Constant", "PEER", "Convolution")
"""One kind of each way to compute."""
OF_THE_LAYER = {
    "without tokens, with one and with padding alone there is an output and a gradient",
    "saved, loaded, copied and pickled, a layer gives the same output",
    "every backend gives the oracle's output and gradients",
    "the same seed gives the same training step",
}
"""Properties that a further setting of a kind of experts cannot break."""


def cases() -> list[object]:
    params, seen = [], set()
    for name, config in CASES.items():
        for prop in properties(config, num_experts=4):
            is_slow = type(config) in seen and prop.name in OF_THE_LAYER
            if prop.name.startswith("torch."):  # a compiler takes a second
                is_slow = name not in (COMPILED if prop.name.startswith("torch.compile") else EXPORTED)
            params.append(pytest.param(prop, id=f"{name}: {prop}", marks=[pytest.mark.slow] if is_slow else []))
        seen.add(type(config))
    return params


@pytest.mark.parametrize("prop", cases())
def test_expert(prop: Property):
    prop.check()


def kinds(base: type = ExpertConfig) -> set[type]:
    below = {kind for sub in base.__subclasses__() for kind in {sub, *kinds(sub)}}
    return {kind for kind in below if kind.__module__.startswith("core.") and kind is not TwoLayerConfig}


def test_every_kind_of_experts_is_public_and_checked():
    assert {kind for kind in kinds() if getattr(core, kind.__name__, None) is not kind} == set()
    # Attention experts compute no rows: their layer has tests of its own.
    assert kinds() - {core.AttentionExperts} == {type(config) for config in CASES.values()}
    with pytest.raises(ValueError, match="sum to 2, not to num_experts=4"):
        properties(Mixed((FFN(), Zero()), (1, 1)), num_experts=4)


# Experts of one's own with one fault each.


class OwnExperts(core.Experts):
    def __init__(self, num_experts: int, dim: int, fault: str) -> None:
        super().__init__()
        self.num_experts, self.fault = num_experts, fault
        self.w = nn.Parameter(torch.randn(num_experts, dim, dim))
        self.scale = nn.Parameter(torch.ones(num_experts, 1))
        self.register_buffer("calls", torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        if self.fault != "is not reset":
            nn.init.normal_(self.w)
        nn.init.ones_(self.scale)
        self.calls.zero_()

    def compute_rows(self, rows: Rows) -> Rows:
        fault, w, offsets_E = self.fault, self.w, rows.offsets_E
        if fault == "takes the next expert's weights":
            w = w.roll(1, 0)
        if fault == "multiplies in float32":
            return rows.with_output(core.expert_linear(rows.x.float(), w.float(), offsets_E))
        y_RD = core.expert_linear(rows.x.to(w.dtype), w, offsets_E, backend=self.backend)
        scale_R1 = self.scale.repeat_interleave(offsets_E.diff(prepend=offsets_E.new_zeros(1)), 0)
        y_RD = torch.cat((y_RD[: len(scale_R1)] * scale_R1, y_RD[len(scale_R1) :]))
        if fault == "sees the other rows":
            y_RD = y_RD - y_RD.mean()
        if fault == "stops a gradient":
            y_RD = y_RD.detach() + 0 * y_RD
        if fault == "is random in evaluation":
            y_RD = y_RD * torch.rand(())
        if fault == "lets padding through":
            y_RD = y_RD + 0 * rows.x.sum()
        return rows.with_output(y_RD)


@dataclass(frozen=True)
class Own(ExpertConfig):
    """A square product, scaled, whose faults are to be found."""

    fault: str = ""

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> OwnExperts:
        return OwnExperts(num_experts, dim, self.fault)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return dim * dim + (self.fault != "forgets a parameter")

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return dim * dim * (1 if self.fault == "counts a multiply-add as one" else 2)


ALONE = "an expert computes its rows as it does alone, in output and all gradients"
FOUND_BY = {
    "takes the next expert's weights": ALONE,
    "sees the other rows": ALONE,
    "stops a gradient": "the gradient is the derivative of the output, in float64",
    "forgets a parameter": "num_params and active_params are the sums of numel",
    "counts a multiply-add as one": "flops_per_row is what a counter counts",
    "is random in evaluation": "nothing is random in evaluation",
    "is not reset": "built on the meta device, emptied and reset, a layer starts as any other",
    "multiplies in float32": "half precision and autocast give the float32 output, rounded",
    "lets padding through": "an expert that no token takes has no gradient, and padding reaches nobody",
}


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_fault_is_found_by_the_property_that_it_breaks(fault):
    for config, has_fault in ((Own(), False), (Own(fault), True)):
        (prop,) = [p for p in properties(config, num_experts=4) if p.name == FOUND_BY[fault]]
        if has_fault:
            with pytest.raises((AssertionError, GradcheckError)):
                prop.check()
        else:
            prop.check()


def test_check_expert_names_each_property_that_fails(monkeypatch):
    for part in (core.testing.experts, core.testing.shared):  # compilers are not asked
        monkeypatch.setattr(part, "CHECKS", [check for check in part.CHECKS if not check.name.startswith("torch.")])
    with pytest.raises(AssertionError) as error:
        check_expert(Own("forgets a parameter"), dim=8)
    first, *lines = str(error.value).splitlines()
    assert "properties of Own(fault='forgets a parameter') do not hold" in first
    names = [line.strip().split(":")[0] for line in lines]
    assert FOUND_BY["forgets a parameter"] in names
    assert ALONE not in names
