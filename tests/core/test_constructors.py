"""A constructor of a base class calls no method that a subclass overrides: what that one needs is not there yet."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest
import torch
from torch import nn

import core
from core.layers.base import MoELayer
from core.routing.gates import LinearGate


def _classes() -> list[type]:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(core.__path__, "core.") if "jit" not in m.name
    ]
    found = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    return [c for c in found if c.__module__.startswith("core.")]


def test_no_constructor_of_core_calls_a_method_that_a_subclass_overrides():
    classes, checked = _classes(), 0
    for base in (c for c in classes if issubclass(c, nn.Module) and "__init__" in vars(c)):
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base.__init__))))
        calls = [n.func for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        names = {f.attr for f in calls if getattr(f.value, "id", "") == "self"}
        for name in names:
            checked += 1
            below = (c for c in classes if c is not base and issubclass(c, base))
            overriding = [c.__name__ for c in below if inspect.isfunction(vars(c).get(name))]
            assert not overriding, f"{base.__name__}.__init__ calls self.{name}(), which {overriding} override"
    assert checked > 30


@pytest.mark.parametrize(
    "base, arguments", [(LinearGate, (4, 2)), (core.MLPExperts, (core.MLP((3,)), 2, 4)), (MoELayer, ())]
)
def test_a_subclass_resets_its_own_parameters_once_it_has_them(base, arguments):
    class Mine(base):
        def __init__(self, *args):
            super().__init__(*args)
            self.own = nn.Parameter(torch.empty(3))
            nn.init.ones_(self.own)

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.ones_(self.own)

    module = Mine(*arguments)
    module.own.data.zero_()
    module.reset_parameters()
    assert module.own.tolist() == [1, 1, 1]
