"""The private parts of torch that the apps use do what they need; a version that changes one fails here."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from apps.train import torch_internals as internals


def test_a_condition_that_is_false_is_an_error():
    internals.assert_on_device(torch.tensor(True), "no error")
    with pytest.raises(RuntimeError, match="two rows"):
        internals.assert_on_device(torch.tensor(False), "two rows")


def test_a_module_computes_its_activations_again_in_the_backward():
    calls = []

    class Square(nn.Module):
        def forward(self, x):
            calls.append("forward")
            return x * x

    module = Square()
    internals.checkpoint_activations(module)
    x = torch.tensor([3.0], requires_grad=True)
    module(x).sum().backward()
    assert calls == ["forward", "forward"]
    assert x.grad.tolist() == [6.0]


def test_a_missing_compiler_is_an_error(monkeypatch):
    if shutil.which("g++"):
        internals.find_cpp_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    # Not by monkeypatch, which would delete the option in the end, for all tests that follow.
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(Exception, match=r"(?i)compiler"),
    ):
        internals.find_cpp_compiler()
