"""A value by the type of its place: as YAML and as a word of the command line, with its class and its defaults."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

import core
from apps.cli.errors import UsageError
from apps.cli.flags import Word
from apps.cli.values import Made, make, path_of, plain, read


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Inner:
    size: int = 3
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=lambda: Inner(size=7))
    more: tuple[Inner, ...] = ()


class Net(nn.Module):
    def __init__(self, width: int, act: Callable[[Any], Any] = torch.relu, inner: Inner | None = None, **kwargs: Any):
        super().__init__()
        self.made = (width, act, inner, kwargs)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, "1e-3", 1e-3),  # as PyYAML reads it
        (Union[float, int], 1, 1),  # noqa: UP007 -- a whole number stays whole in either order
        (Optional[Union[float, str, int]], Word("600"), 600),  # noqa: UP007, UP045
        (float | None, Word("null"), None),
        (bool | int, Word("true"), True),
        (str, Word("5"), "5"),
        (str | None, Word("[a-z]"), "[a-z]"),
        (str | list[int], Word("[1, 2]"), [1, 2]),
        (Literal[16, "32-true"], Word("16"), 16),
        (Annotated[int, "rule"], Word("4"), 4),
        (tuple[int, float], [1, 2], (1, 2.0)),
        (tuple[int, ...], Word("[1, 2, 3]"), (1, 2, 3)),
        (Sequence[str], ["a"], ["a"]),
        (set[int], [1, 1], {1}),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (Mapping[int, str], {1: "a"}, {1: "a"}),
        (Path, "a/b", Path("a/b")),
        (Colour, "RED", Colour.RED),
        (Any, Word("{a: [1e-3]}"), {"a": ["1e-3"]}),
        (Any, Word("1e-3"), 1e-3),
        (inspect.Parameter.empty, Word("x"), "x"),
        (Callable[..., Any], "torch.nn.functional.relu", torch.nn.functional.relu),
        (type[nn.Module], "torch.nn.Linear", nn.Linear),
        (Logger | Iterable[Logger] | bool | None, Word("false"), False),
    ],
)
def test_a_value_has_the_type_of_its_place(hint, value, expected):
    own = read(value, hint, "it")
    assert own == expected
    assert type(own) is type(expected)
    assert read(plain(own), hint, "it") == own


@pytest.mark.parametrize(
    ("hint", "value", "line"),
    [
        (int, True, "it=True is not of type int"),
        (int, 1.5, "it=1.5 is not of type int"),
        (int | float | None, "x", "it=x is not one of int, float"),
        (str, 5, "it=5 is not of type str"),
        (Literal["a", "b"], "c", "it=c is not one of a, b"),
        (list[int], [1, "x"], "it.1=x is not of type int"),
        (tuple[int, int], [1], r"it=\[1\] is not of type tuple\[int, int\]"),
        (Inner, {"sise": 1}, "it.sise does not exist; did you mean 'size'"),
        (Inner, {"size": "x"}, "it.size=x is not of type int"),
        (Outer, {"inner": {}}, "it needs name, which has no default"),
        (Inner | None, 5, "it=5 is not of type Inner"),
        (nn.Module, {"size": 5}, "it has no class_path, which says what Module it is"),
        (nn.Module, {"class_path": "lightning.pytorch.loggers.CSVLogger"}, "it=.*CSVLogger is no Module"),
        (nn.Module, {"class_path": "torch.nn.ReLU", "more": 1}, "it has 'more' beside class_path and init_args"),
        (Callback, "CSVLogger", "it=CSVLogger does not exist"),
        (Callable[..., Any], "torch.relux", "it=torch.relux does not exist: module 'torch' has no attribute 'relux'"),
        (type[Callback], "torch.nn.Linear", "it=torch.nn.Linear is not of type"),
        (core.RouterConfig, "TokenChoic", "it=TokenChoic does not exist; did you mean 'TokenChoice'"),
    ],
)
def test_another_value_is_one_line(hint, value, line):
    for own in (value, Word(value)) if isinstance(value, str) else (value,):
        with pytest.raises(UsageError, match=f"^{line}"):
            read(own, hint, "it")


def test_an_object_has_its_arguments_with_defaults_and_is_made_as_often_as_asked():
    own = read({"name": "a", "inner": {"rate": 1}, "more": [{"size": 1}]}, Outer, "it")
    assert plain(own) == {"name": "a", "inner": {"size": 7, "rate": 1.0}, "more": [{"size": 1, "rate": 0.5}]}
    assert make(own) == make(own) == Outer("a", Inner(7, 1.0), (Inner(1, 0.5),))
    logger = read({"class_path": "CSVLogger", "init_args": {"save_dir": "a"}}, Logger | bool, "it")
    first, second = make(logger), make(logger)
    assert isinstance(first, CSVLogger)
    assert first is not second


def test_a_class_of_the_users_own_is_made_with_what_its_constructor_does_not_name():
    path = f"{__name__}.Net"
    value = {"class_path": path, "init_args": {"width": 2, "inner": {"size": 4}}, "dict_kwargs": {"depth": 3}}
    for hint in (nn.Module, Any):
        section = read(value, hint, "it")
        assert make(section).made == (2, torch.relu, Inner(4), {"depth": 3})
        assert read(plain(section), hint, "it") == section
    assert plain(section)["dict_kwargs"] == {"depth": 3}


def test_a_config_of_core_keeps_its_default_s_class_and_another_class_begins_anew():
    held = core.FFN(hidden_dim=8, activation="gelu")
    kept = make(read({"hidden_dim": 16}, core.ExpertConfig, "it", held))
    assert kept == core.FFN(hidden_dim=16, activation="gelu")
    assert make(read("SwiGLU", core.ExpertConfig, "it", held)) == core.SwiGLU()
    assert plain(read(Word("core.SwiGLU"), core.ExpertConfig, "it"))["class_path"] == "core.SwiGLU"


def test_a_class_is_named_in_the_outermost_package_that_offers_it():
    assert path_of(torch.optim.SGD) == "torch.optim.SGD"
    assert path_of(CSVLogger) == "lightning.pytorch.loggers.CSVLogger"
    assert path_of(core.TokenChoice) == "core.TokenChoice"
    assert path_of(Net) == f"{__name__}.Net"
    assert Made(Net, {}).is_named
