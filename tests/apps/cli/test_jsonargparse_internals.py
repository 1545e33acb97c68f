"""A whole number is read as one, in whichever order a type names its kinds."""

from __future__ import annotations

from typing import Optional, Union

import pytest
from jsonargparse import ArgumentParser

from apps.cli.jsonargparse_internals import options_of, parameters_of, read_whole_numbers_first


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
