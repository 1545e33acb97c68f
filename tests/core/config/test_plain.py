"""Configs as plain values and back: which name their class, what is made again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from core import FFN, Balance, MMoE, MoEConfig, SwiGLU, TokenChoice, register_config, registered_config
from core.config.plain import arguments_from_plain, arguments_to_plain, from_plain, to_plain


@register_config
@dataclass(frozen=True)
class Tower:
    """A config of one class, as an app may have it."""

    dims: tuple[int, ...] = (8,)
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] | None = None
    moe: MoEConfig | None = None


@register_config
@dataclass(frozen=True)
class Part:
    name: str = "a"


@register_config
@dataclass(frozen=True)
class Wide(Part):
    width: int = 2


class Base:
    def __init__(self, tower: Tower | None = None, unhinted=None) -> None: ...


class Module(Base):
    def __init__(self, num: int = 1, sizes: list[int] | None = None, **kwargs: Any) -> None: ...


TOWER = Tower((4, 2), (Part("x"), Part("y")), {"z": Part()}, MoEConfig(4, TokenChoice(1), SwiGLU(16)))


def test_a_class_is_named_where_its_place_allows_several():
    plain = to_plain(TOWER, Tower | None)
    assert (plain["dims"], plain["parts"]) == ([4, 2], [{"name": "x"}, {"name": "y"}])
    assert (plain["by_name"], plain["moe"]["router"]["class_path"]) == ({"z": {"name": "a"}}, "core.TokenChoice")
    assert plain["moe"]["balance"]["load"] == 0.0
    # Nothing says what stands here, or a base class does.
    assert to_plain(TOWER)["class_path"] == f"{__name__}.Tower"
    assert to_plain(Wide(), Part) == {"class_path": f"{__name__}.Wide", "init_args": {"name": "a", "width": 2}}
    assert from_plain({"dims": [3], "moe": MoEConfig(2)}, Tower) == Tower((3,), moe=MoEConfig(2))
    assert from_plain({"class_path": "FFN"}) == FFN()
    assert from_plain({"class_path": "Tower", "init_args": None}, Tower) == Tower()


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (TOWER, Tower),
        (TOWER, Any),
        (Wide("b", 3), Part),
        (Part("b"), Part | None),
        (MMoE(2), MMoE | None),
        ((1, FFN(3)), tuple[int, Any]),
        ({"a": [1, None, "x"]}, Any),
        ([Part(), Wide()], list[Part]),
        (Balance(load=0.5), Balance),
    ],
)
def test_plain_values_survive_json_and_come_back_equal(value, hint):
    assert from_plain(json.loads(json.dumps(to_plain(value, hint))), hint) == value


def test_arguments_of_a_constructor_and_its_base():
    arguments = {"num": 2, "sizes": [1, 2], "tower": TOWER, "unhinted": Part("c")}
    plain = json.loads(json.dumps(arguments_to_plain(Module, arguments)))
    assert set(plain["tower"]) == {"dims", "parts", "by_name", "moe"}
    assert plain["unhinted"]["class_path"] == f"{__name__}.Part"
    assert arguments_from_plain(Module, plain, "model") == arguments


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ({"class_path": "os.system"}, Any, r"^at: class_path='os\.system' is not a registered config class"),
        ([{"a": {"class_path": "os.system"}}], Any, r"^at\.0\.a: class_path='os\.system' is not a registered"),
        ({"class_path": "core.FFN"}, Part, r"^at: class_path='core\.FFN' is no Part$"),
        ({"class_path": "core.FFN", "args": {}}, Any, "^at has 'args' beside class_path and init_args$"),
        ({"class_path": "core.FFN", "init_args": [1]}, Any, r"^at=\[1\] is not a mapping of FFN's options$"),
        ({"nam": "x"}, Part, "^at: Part has no field 'nam'; did you mean 'name'\\?$"),
        ({"parts": [{"size": 1}]}, Tower, r"^at\.parts\.0: Part has no field 'size'; it has name$"),
        ({"moe": {"num_experts": 4, "router": {"top_k": 2}}}, Tower, r"^at\.moe\.router has no class_path, which says"),
        ({"moe": {"num_experts": 4, "topk": 2}}, Tower, "MoEConfig has no field 'topk'"),
        ({"moe": {"num_experts": 4, "balance": {"z": 0.1}}}, Tower, "Balance has no field 'z'"),
        ({"class_path": "core.TopK"}, Any, r"'core\.TopK' is not a registered config class; did you mean 'T"),
        ({"class_path": "core.TokenChoice", "init_args": {"k": 2}}, Any, "has no field 'k'; it has .*top_k"),
        ({"moe": {}}, Tower, r"^at\.moe: .*missing 1 required positional argument: 'num_experts'$"),
        ({"moe": {"num_experts": 2, "router": {"class_path": "TokenChoice", "init_args": {"top_k": 3}}}}, Tower,
         "^top_k=3 exceeds num_experts=2"),
        ("x.yaml", Tower | None, r"^at='x\.yaml' is a text in place of a Tower$"),
        ("x.yaml", list[Part], "is a text in place of a Part"),
        ("x.yaml", dict[str, Part] | None, "is a text in place of a Part"),
        ("os.system", Callable[[str], int] | None, "is a text in place of a Callable"),
        (3, Tower | None, "^at=3 is neither a Tower nor a mapping of its options$"),
        (FFN(), Part, r"^at=FFN\(.*\) is neither a Part nor a mapping of its options$"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(value, hint, message):
    with pytest.raises(ValueError, match=message):
        from_plain(value, hint, "at")


@pytest.mark.parametrize("hint", [str | None, str | Part, Any, Literal["a"], Path | None, list[str], int, float | None])
def test_a_text_stands_where_no_class_belongs(hint):
    assert from_plain("a", hint) == "a"


def test_a_plain_name_means_core_s_class_or_the_only_one_and_a_class_that_is_not_registered_is_not_written():
    assert registered_config("Wide") is registered_config(f"{__name__}.Wide") is Wide
    assert registered_config("FFN") is registered_config("core.FFN") is FFN
    with pytest.raises(ValueError, match=r"'core\.Wide' is not a registered config class"):
        registered_config("core.Wide")

    @dataclass(frozen=True)
    class Unknown:
        x: int = 1

    with pytest.raises(ValueError, match=r"no checkpoint can be loaded with a .*Unknown: decorate the class with core"):
        to_plain({"a": Unknown()})
    with pytest.raises(ValueError, match=r"type hints of Odd\.__init__ cannot be read: name 'Gone' is not defined"):
        arguments_from_plain(Odd, {}, "model")


class Odd:
    def __init__(self, gone: Gone) -> None: ...  # noqa: F821
