"""The public classes by their short names."""

from __future__ import annotations

import pytest

from apps import registry
from apps.train.module import SparseModule

NAMES = [*registry.MODULES, *registry.DATA, *registry.TRAINER]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_and_the_class_path_mean_one_class(name):
    kind = registry.resolve(name)
    path = registry.class_path(kind)
    assert path == registry.full_path(name) == registry.full_path(path)
    assert registry.full_path(f"apps.gone.{name}") is None
    assert registry.name_of(kind) == registry.name_of(path) == name
    assert registry.name_of(f"apps.gone.{name}") == f"apps.gone.{name}"


def test_a_name_stands_for_one_class():
    assert len(NAMES) == len(set(NAMES))
    with pytest.raises(KeyError, match="Nobody"):
        registry.resolve("Nobody")


def test_every_module_of_the_apps_is_in_the_registry():
    for name in registry.MODULES:
        registry.resolve(name)
    own = [kind.__name__ for kind in registry.subclasses(SparseModule) if kind.__module__.startswith("apps.")]
    public = {name for name in own if not name.startswith("_")}
    bases = {"SparseModule", "TextModule", "WritingModule", "JudgedModule"}
    assert public - bases == set(registry.MODULES)
