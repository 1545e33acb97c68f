"""What is used of jsonargparse beyond its documentation."""

from __future__ import annotations

from apps.cli.jsonargparse_internals import parameters_of


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
