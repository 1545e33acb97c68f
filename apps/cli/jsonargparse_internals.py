"""The undocumented part of jsonargparse that the command line uses: no other file does.

It holds for jsonargparse 4.53; tests/apps/cli/test_jsonargparse_internals.py fails if a new version
changes it.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import _parameter_resolvers


def parameters_of(kind: type[Any]) -> list[Any]:
    """Return the parameters of a constructor and of the constructors that its ``**kwargs`` go to.

    Each has ``name``, ``annotation``, ``default``, and ``doc``, its docstring entry.
    """
    return list(_parameter_resolvers.get_signature_parameters(kind, None))
