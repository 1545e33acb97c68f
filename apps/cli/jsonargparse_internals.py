"""Undocumented parts of jsonargparse that the command line uses: no other file does.

These functions hold for jsonargparse 4.53; tests/apps/cli/test_jsonargparse_internals.py fails if a new version
changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, _actions, _core, _parameter_resolvers, _subcommands, _typehints


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the dotted options of a parser, which it lists in its help only."""
    return [action.dest for action in parser._actions]


def parameters_of(kind: type[Any]) -> list[Any]:
    """Return the parameters of a constructor and of the constructors that its ``**kwargs`` go to.

    Each has ``name``, ``annotation``, ``default``, and ``doc``, its docstring entry.
    """
    return list(_parameter_resolvers.get_signature_parameters(kind, None))


def read_whole_numbers_first() -> None:
    """Let jsonargparse try int before float, in whichever order a type names them; it has no option for the order.

    ``Union[int, float]`` equals ``Union[float, int]`` to ``typing``, whose cache gives out the one for the other,
    depending on earlier imports: ``--trainer.limit_train_batches 1`` would be read as 1.0, all batches.
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


def find_options_by_name() -> None:
    """Let jsonargparse look an option up by its name; it walks through all options, a quarter of the time of reading.

    Parsers with subcommands are searched as before.
    """
    if not isinstance(_subcommands.find_action_and_subcommand, _ByName):
        _core.find_action_and_subcommand = _subcommands.find_action_and_subcommand = _ByName(
            _subcommands.find_action_and_subcommand
        )


class _ByName:
    """Finds the action of an option as ``walk`` does, by the names of each parser."""

    def __init__(self, walk: Callable[..., Any]) -> None:
        self.walk = walk

    def __call__(self, parser: Any, dest: str, exclude: Any = None) -> tuple[Any, str | None]:
        if getattr(parser, "_subcommands_action", None) is not None:
            return self.walk(parser, dest, exclude)
        known, by_name = parser.__dict__.get("_names", ([], {}))
        if known != parser._actions:  # options are added, and removed, until all are there
            known, by_name = list(parser._actions), {}
            for action in _actions.filter_non_parsing_actions(known):
                for name in {action.dest, *(option[2:] for option in action.option_strings if option[:2] == "--")}:
                    by_name.setdefault(name, []).append(action)
            parser.__dict__["_names"] = known, by_name
        found = [a for a in by_name.get(dest, ()) if exclude is None or not isinstance(a, exclude)]
        late = (_actions._ActionConfigLoad, _actions.ActionFail)
        first = next((action for action in found if not isinstance(action, late)), None)
        return first or next(reversed(found), None), None
