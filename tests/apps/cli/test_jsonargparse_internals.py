"""A whole number is read as one, in whichever order a type names its kinds; options are found by their names."""

from __future__ import annotations

import itertools
from typing import Optional, Union

import pytest
from jsonargparse import ArgumentParser, _actions, _core, _subcommands

from apps.cli.jsonargparse_internals import find_options_by_name, options_of, parameters_of, read_whole_numbers_first


@pytest.mark.parametrize("kind", [Union[float, int], Union[int, float], Optional[Union[float, str, int]]])  # noqa: UP007, UP045
def test_a_whole_number_stays_whole(kind):
    read_whole_numbers_first()
    read_whole_numbers_first()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--size", type=kind)
    for text, value in (("1", 1), ("0.5", 0.5), ("600", 600)):
        read = parser.parse_args(["--size", text]).size
        assert read == value
        assert type(read) is type(value)


def test_the_options_of_a_parser_are_its_dotted_names():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.size", type=int)
    parser.add_argument("--seed", type=int)
    assert [name for name in options_of(parser) if name != "help"] == ["model.size", "seed"]


def test_parameters_have_types_and_meanings_those_of_the_next_class_too():
    class Base:
        """A base.

        Args:
            size: how large it is.
        """

        def __init__(self, size: int = 1, seed: int = 0):
            pass

    class Own(Base):
        def __init__(self, seed: int = 5, **kwargs):
            super().__init__(seed=seed, **kwargs)

    found = [(p.name, p.annotation, p.default, p.doc) for p in parameters_of(Own)]
    assert found == [("seed", int, 5, None), ("size", int, 1, "how large it is.")]


def test_an_option_is_found_by_its_name_as_jsonargparse_finds_it():
    find_options_by_name()
    by_name = _subcommands.find_action_and_subcommand
    find_options_by_name()
    assert _subcommands.find_action_and_subcommand is _core.find_action_and_subcommand is by_name
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--cfg", action="config")
    assert by_name(parser, "seed") == (None, None)  # before it is there
    parser.add_argument("--seed", "--start", type=int)
    parser.add_argument("place")
    parser.add_argument("--model", type=Optimizer)
    parser.add_class_arguments(Optimizer, "optimizer")
    names = ["cfg", "seed", "start", "place", "model", "optimizer", "optimizer.lr", "help", "nothing"]
    for name, exclude in itertools.product(names, (None, _actions._ActionConfigLoad)):
        assert by_name(parser, name, exclude) == by_name.walk(parser, name, exclude), name
    assert by_name(parser, "start")[0].dest == "seed"
    above = ArgumentParser(exit_on_error=False)
    above.add_subcommands().add_subcommand("fit", parser)
    assert by_name(above, "fit.seed")[1] == "fit"


class Optimizer:
    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr
