"""tabm's backbone (TabM, arXiv 2410.24210) beside our ``BatchEnsemble``. Version seen: 0.0.3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import core

tabm = pytest.importorskip("tabm")

D, M, B = 10, 3, 7


def pair() -> tuple[Any, Any]:
    """Their backbone and our experts, with the same weights."""
    torch.manual_seed(0)
    peer = tabm.MLPBackboneBatchEnsemble(
        d_in=D, n_blocks=2, d_block=12, dropout=0.0, k=M, tabm_init=True, scaling_init="random-signs",
        start_scaling_init_chunks=None,
    )  # fmt: skip
    experts = core.BatchEnsemble((12, 12)).build(M, D)
    with torch.no_grad():
        for i, block in enumerate(peer.blocks):
            for p in block[0].parameters():
                p.add_(torch.randn_like(p) / 5)  # scales other than 1
            for name, own in weights_of(experts, i).items():
                own.copy_(getattr(block[0], name))
    return peer, experts


def weights_of(experts: Any, i: int) -> dict[str, Tensor]:
    own = {name: getattr(experts, f"{key}_{i}") for name, key in (("r", "r"), ("s", "s"), ("bias", "b"))}
    return {**own, "weight": experts.common[f"w_{i}"][0].t()}


def test_members_give_the_same_output_and_gradients():
    peer, experts = pair()
    x, x_peer = (torch.linspace(-2, 2, B * D).view(B, D).requires_grad_() for _ in range(2))
    y, expected = experts(x, "each"), peer(x_peer[:, None].expand(B, M, D))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_peer.grad, rtol=1e-5, atol=1e-5)
    for i, block in enumerate(peer.blocks):
        grads = {name: getattr(experts, f"{key}_{i}").grad for name, key in (("r", "r"), ("s", "s"), ("bias", "b"))}
        grads["weight"] = experts.common[f"w_{i}"].grad[0].t()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, getattr(block[0], name).grad, rtol=1e-5, atol=1e-5)


def test_members_start_as_theirs_do():
    experts = core.BatchEnsemble((12, 12)).build(M, D)
    assert set(experts.r_0.flatten().tolist()) == {-1.0, 1.0}
    assert all((p == 1).all() for p in (experts.s_0, experts.r_1, experts.s_1))
    assert torch.equal(experts.b_0[0], experts.b_0[2])
