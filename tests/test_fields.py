"""What the type of a config's field says holds for every config that is registered, of the engine and of the apps."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import core
from apps.cli.errors import UsageError
from apps.cli.flags import Word
from apps.cli.values import parameters, read
from core import registry
from core.fields import Bounds, Checked, Count, Length, OneOf, Positive, check_values

ROOT = Path(__file__).resolve().parents[1]
for path in sorted((ROOT / "apps").rglob("*.py")):
    if re.search("register_config|OpenConfig|Checked", path.read_text(encoding="utf-8")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def below(kind: type) -> Iterator[type]:
    """Yield the subclasses of a class that the packages define."""
    for part in kind.__subclasses__():
        if part.__module__.startswith(("core.", "apps.")):
            yield part
        yield from below(part)


REGISTERED = (kind for kind in registry._REGISTERED.values() if kind.__module__.startswith(("core.", "apps.")))
KINDS = list(dict.fromkeys((*REGISTERED, *below(Checked), *below(registry.OpenConfig))))

# Arguments of the configs that cannot be made without any.
NEEDED: dict[str, dict[str, Any]] = {
    "ContrastiveLoss": {"temperature": 0.1},
    "DistilConfig": {"teacher": "runs/large"},
    "Domain": {"num_domains": 8},
    "DomainRandom": {"num_domains": 4, "vocab_size": 7},
    "FeedForwardPart": {"expert": core.FFN(), "weights": {}, "dim": 8, "out_dim": 8},
    "GrowConfig": {"checkpoint": "runs/small"},
    "Hash": {"vocab_size": 7},
    "Mixed": {"experts": (core.FFN(), core.Zero()), "counts": (7, 1)},
    "MoEConfig": {"num_experts": 8},
    "PatchGrid": {"patch_size": 2},
    "SparsifyConfig": {"modules": "mlp", "moe": core.MoEConfig(8)},
    "Stable": {"vocab_size": 7},
    "Task": {"num_tasks": 3},
    "TaskConfig": {"column": "bought"},
    "TimmConfig": {"name": "convnext_atto"},
}
ABSTRACT = {"MultiGateConfig", "ImagePart", "TextPart", "Start"}


def rules(hint: Any, place: Any = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Yield each rule in a hint, the type that it restricts, and the containers around it from the inside out."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from ((rule, inner[0], place) for rule in inner[1:])
        yield from rules(inner[0], place)
    elif origin is Literal:
        yield OneOf(*inner), type(inner[0]), place
    elif origin in (tuple, list):
        yield from rules(inner[0], (lambda value: (value,) * (1 if inner[-1] is ... else len(inner)), *place))
    elif origin in (dict, Mapping):
        yield from rules(inner[1], (lambda value: {"a": value}, *place))
    else:
        for part in inner:
            yield from rules(part, place)


def around(rule: Any, kind: Any) -> tuple[list[Any], list[Any]]:
    """Return values that break a rule, the nearest to it among them, and the outermost values that keep it."""
    if isinstance(rule, Length):
        return ["" if kind is str else (1,) * int(rule.low - 1)], []
    if isinstance(rule, OneOf):
        return ["no such name"], list(rule.names)
    below, above = (-1, 1) if kind is int else (-math.inf, math.inf)
    beyond = (lambda v, to: v + to) if kind is int else math.nextafter
    wrong, right = [] if kind is int else [math.nan], []
    for bound, end, out, back in ((rule.low, rule.ends[0], below, above), (rule.high, rule.ends[1], above, below)):
        is_allowed = end in "[]"
        if math.isfinite(bound):
            wrong.append(beyond(bound, out) if is_allowed else bound)
            right.append(bound if is_allowed else beyond(bound, back))
        elif not is_allowed and kind is float:
            wrong.append(bound)
    return wrong, right


def hints(kind: type) -> dict[str, Any]:
    """Return the types of the fields that a config is made with."""
    own = {f.name for f in dataclasses.fields(kind) if f.init} if dataclasses.is_dataclass(kind) else {}
    return {name: hint for name, hint in typing.get_type_hints(kind, include_extras=True).items() if name in own}


CONFIGS = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.__name__ not in ABSTRACT], ids=lambda kind: kind.__qualname__
)


def test_every_rule_is_found():
    """Guards the walk: fields with rules, by package."""
    assert sum(any(rules(hint)) for kind in KINDS for hint in hints(kind).values()) > 150


@CONFIGS
def test_a_value_just_outside_is_rejected_by_name_value_and_rule_and_the_bound_is_allowed(kind):
    needed = NEEDED.get(kind.__name__, {})
    for name, hint in hints(kind).items():
        for rule, of, place in rules(hint):
            wrong, right = around(rule, of)
            for value in wrong:
                given = value
                for wrap in place:
                    given = wrap(given)
                with pytest.raises(ValueError) as error:
                    kind(**needed | {name: given})
                text, prefix = str(error.value), getattr(kind, "prefix", "")
                assert text.startswith(f"{prefix}{name}")
                assert repr(value) in text
                assert str(rule) in text or not math.isfinite(value)
                assert "\n" not in text
            for value in right:
                for wrap in place:
                    value = wrap(value)
                check_values(hint, **{name: value})


@CONFIGS
def test_a_subclass_keeps_the_rules_of_a_field(kind):
    own = typing.get_type_hints(kind, include_extras=True)
    for base in kind.__mro__[1:-1]:
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            before = [str(rule) for rule, _, _ in rules(hint)]
            assert not before or [str(rule) for rule, _, _ in rules(own[name])], f"{kind.__name__}.{name}: {before}"


@dataclass(frozen=True)
class Window(Checked):
    prefix = "window."

    length: Count | None = 8
    shape: Annotated[str, OneOf("hann", "flat_top")] = "hann"
    sizes: Annotated[tuple[Count, ...], Length(1)] = (1,)
    ends: tuple[float, float] = (0.0, 1.0)
    rows: Mapping[str, Positive] = dataclasses.field(default_factory=dict)
    expert: core.ExpertConfig | None = None
    stop: bool | Literal["never"] = False


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": True}, "length=True is not an integer or None"),
        ({"length": 2.0}, "length=2.0 is not an integer or None"),
        ({"length": 0}, "length=0 is not at least 1"),
        ({"shape": "Flat-Top"}, "shape='Flat-Top' is not one of hann, flat_top; did you mean 'flat_top'?"),
        ({"shape": None}, "shape=None is not text"),
        ({"sizes": 3}, "sizes=3 is not a list"),
        ({"sizes": ()}, "sizes=() has length 0, which is not at least 1"),
        ({"sizes": (1, 0)}, "sizes[1]=0 is not at least 1"),
        ({"ends": (1.0,)}, "ends=(1.0,) has length 1, which is not 2"),
        ({"ends": (1.0, "x")}, "ends[1]='x' is not a number"),
        ({"rows": {"a": 1.0, "b": math.inf}}, "rows['b']=inf is not finite"),
        ({"rows": [1.0]}, "rows=[1.0] is not a mapping"),
        ({"expert": "FFN"}, "expert='FFN' is not of class ExpertConfig or None"),
        ({"stop": "always"}, "stop='always' is not one of never"),
        ({"shape": "x" * 99}, f"shape='{'x' * 56}... is not one of hann, flat_top"),
    ],
)
def test_one_line_says_where_what_and_why(options, message):
    with pytest.raises(ValueError) as error:
        Window(**options)
    assert str(error.value) == f"window.{message}"


def test_lists_become_tuples_and_whole_numbers_are_numbers():
    window = Window(sizes=[2, 3], ends=[0, 1], length=None)
    assert (window.sizes, window.ends) == ((2, 3), (0, 1))


def test_a_reason_stands_at_the_end():
    with pytest.raises(ValueError, match=r"^k=1 is not at least 2: one is none$"):
        check_values(Annotated[int, Bounds(2, why="one is none")], k=1)


@CONFIGS
def test_the_command_line_reads_the_types_too(kind):
    for name, hint in hints(kind).items():
        plain = [of for _, of, place in rules(hint) if not place]
        if plain and not {str, tuple}.intersection(typing.get_origin(of) or of for of in plain):
            with pytest.raises(UsageError, match=f"^it.{name}=many is not "):
                read(Word("many"), parameters(kind)[name][0], f"it.{name}")
