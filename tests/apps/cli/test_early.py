"""What the source of a class says of its arguments is what the imported class has."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping

import pytest
from lightning.pytorch import Trainer

from apps import registry
from apps.cli.early import _TRAINER, _evaluated, _parameters, _Unclear, check_early
from apps.cli.errors import UsageError
from apps.cli.values import parameters

PATHS = [str(registry.full_path(name)) for name in (*registry.MODELS, *registry.DATA)]


def hints(path: str) -> dict[str, object]:
    """Return the type hint of each argument by the source of its class; Unclear where it is."""
    out: dict[str, object] = {}
    for name, (node, imports) in _parameters(path).items():
        out[name] = _Unclear
        for with_core in (True, False):
            with contextlib.suppress(_Unclear):
                out[name] = _evaluated(node, imports, with_core)
    return out


@pytest.mark.parametrize("path", PATHS)
def test_the_source_has_the_arguments_and_types_of_the_class(path):
    known = parameters(registry.resolve(path.rpartition(".")[2]))
    found = hints(path)
    own = {"dataset"} if path.endswith("HubTextData") else set()  # which it gives to the class above by itself
    assert found.keys() == known.keys() | own
    clear = {name: hint for name, hint in found.items() if hint is not _Unclear and name not in own}
    assert clear == {name: known[name][0] for name in clear}
    assert len(clear) >= len(found) / 3


def test_the_source_has_the_arguments_of_the_trainer():
    found = hints(_TRAINER)
    assert found.keys() == parameters(Trainer).keys()
    assert found["max_epochs"] == parameters(Trainer)["max_epochs"][0]
    assert found["strategy"] is _Unclear  # it names classes of Lightning


def model(**arguments: object) -> Mapping[str, object]:
    return {"model": {"class_path": registry.full_path("VisionClassifier"), "init_args": arguments}}


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (model(image_sise=3), r"^model.image_sise does not exist; did you mean 'image_size'\?"),
        (model(image_size="wide"), "^model.image_size=wide is not of type int"),
        ({"trainer": {"max_epoch": 3}}, r"^trainer.max_epoch does not exist; did you mean 'max_epochs'\?"),
        ({"trainer": {"max_steps": "x"}}, "^trainer.max_steps=x is not of type int"),
    ],
)
def test_a_wrong_name_or_type_is_found(config, rule):
    with pytest.raises(UsageError, match=rule):
        check_early(config)


def test_a_config_of_core_is_checked_where_all_of_it_is_there():
    with pytest.raises(ValueError, match=r"^top_k=9 exceeds num_experts=4"):
        check_early(
            model(moe={"num_experts": 4, "router": {"class_path": "TokenChoice", "init_args": {"top_k": 9}}}), True
        )
    check_early(model(moe={"capacity_factor": -1.0}), True)  # a checkpoint may bring the number of experts
    check_early(model(moe={"num_experts": "many"}))  # a class of core, which is not imported here


@pytest.mark.parametrize(
    "source",
    [
        "class Own(Base):\n    pass",
        "class Own(lib.Base):\n    def __init__(self, n: int, **kwargs): ...",
        "class Other: ...",
        "class Own(:",
    ],
)
def test_what_the_source_does_not_say_is_left_to_the_class(tmp_path, monkeypatch, source):
    (tmp_path / "some_own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    check_early({"model": {"class_path": "some_own.Own", "init_args": {"anything": 1}}})


def test_an_annotation_runs_no_code():
    for text in ("exec('x')", "[int][0]", "Literal[f()]", "x.y", "'int'"):
        with pytest.raises(_Unclear):
            _evaluated(ast.parse(text, mode="eval").body, {"Literal": "typing.Literal"}, True)
