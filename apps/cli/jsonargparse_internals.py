"""What the command line uses of jsonargparse that jsonargparse does not document: no other file does.

These functions hold for jsonargparse 4.53; tests/apps/cli/test_jsonargparse_internals.py fails where a new version
changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, _parameter_resolvers, _typehints


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the dotted options of a parser, which it lists in its help only."""
    return [action.dest for action in parser._actions]


def parameters_of(kind: type[Any]) -> list[Any]:
    """Return the parameters of a constructor and of those that its ``**kwargs`` go to.

    Each has ``name``, ``annotation``, ``default``, and ``doc``, what a docstring says of it.
    """
    return list(_parameter_resolvers.get_signature_parameters(kind, None))


def read_whole_numbers_first() -> None:
    """Let jsonargparse try int before float, in whichever order a type names them; it has no option for the order.

    ``Union[int, float]`` equals ``Union[float, int]`` to ``typing``, whose cache gives out the one for the other,
    depending on what was imported before: ``--trainer.limit_train_batches 1`` would be read as 1.0, all batches.
    """
    if not isinstance(_typehints.sort_subtypes_for_union, _WholeFirst):
        _typehints.sort_subtypes_for_union = _WholeFirst(_typehints.sort_subtypes_for_union)


class _WholeFirst:
    """Sorts the types of a union as jsonargparse does, then puts int before float."""

    def __init__(self, sort: Callable[..., Any]) -> None:
        self._sort = sort

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        kinds = list(self._sort(*args, **kwargs))
        if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
            kinds.remove(int)
            kinds.insert(kinds.index(float), int)
        return kinds
