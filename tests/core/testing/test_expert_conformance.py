"""Every kind of experts of the tree keeps the properties of experts, and a fault in one is found."""

from __future__ import annotations

import pytest

import core
from core import FFN, GEGLU, MLP, Constant, Copy, ExpertConfig, Mixed, SwiGLU, Zero
from core.testing import Property, properties

CASES: dict[str, ExpertConfig] = {
    "FFN": FFN(12),
    "FFN with bias": FFN(12, "relu", bias=True),
    "SwiGLU": SwiGLU(12),
    "GEGLU with bias": GEGLU(12, bias=True),
    "MLP": MLP((12, 10), dropout=0.1),
    "MLP, layer norm": MLP((12,), norm="layer"),
    "MLP, batch norm": MLP((12,), norm="batch"),
    "Zero": Zero(),
    "Copy": Copy(),
    "Constant": Constant(),
    "Constant, mixed in": Constant(mix=True),
    "Mixed": Mixed((FFN(12), Zero(), SwiGLU(8)), (2, 1, 1)),
    "Mixed, MoE++": Mixed((FFN(12, bias=True), Copy(), Constant(mix=True), Zero()), (1, 1, 1, 1)),
}


def cases() -> list[object]:
    return [
        pytest.param(prop, id=f"{name}: {prop}")
        for name, config in CASES.items()
        for prop in properties(config, num_experts=4)
    ]


@pytest.mark.parametrize("prop", cases())
def test_expert(prop: Property):
    prop.check()


def kinds(base: type = ExpertConfig) -> set[type]:
    below = {kind for sub in base.__subclasses__() for kind in {sub, *kinds(sub)}}
    return {kind for kind in below if kind.__module__.startswith("core.")}


def test_every_kind_of_experts_is_public_and_checked():
    assert {kind for kind in kinds() if getattr(core, kind.__name__, None) is not kind} == set()
    assert kinds() == {type(config) for config in CASES.values()}
