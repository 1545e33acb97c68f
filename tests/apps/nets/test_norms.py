"""RMSNorm against its equation, and inside ``steady``."""

import copy

import pytest
import torch
from torch.testing import assert_close

from apps.nets.config import TransformerConfig
from apps.nets.norms import RMSNorm, build_norm


@pytest.fixture
def norm() -> RMSNorm:
    norm = build_norm(TransformerConfig("nano", dim=16, norm="rms", norm_eps=0.01))
    assert isinstance(norm, RMSNorm)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_a_steady_norm_is_the_same(norm, scale):
    x = scale * torch.randn(3, 2, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    assert_close(norm(x), expected)
    with torch.no_grad(), norm.steady():
        assert_close(norm(x), expected)


def test_a_norm_is_steady_inside_the_block_alone(norm):
    x = torch.randn(2, 16)
    with torch.no_grad(), norm.steady():
        before = norm(x)
    with torch.no_grad():
        norm.weight.mul_(2.0)
    assert_close(norm(x), 2 * before)
    with torch.no_grad(), norm.steady():
        with norm.steady():
            twin = copy.deepcopy(norm)
        assert norm._scaled is not None
        twin.weight.mul_(2.0)
        assert_close(twin(x), 2 * norm(x))
    with norm.steady():  # with gradients, an optimizer may write to the weight
        norm(x).sum().backward()
    assert norm.weight.grad is not None
