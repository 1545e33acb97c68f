"""Gradio, the library of the page, is optional."""

from __future__ import annotations

import importlib.util

NAME = "gradio"
"""The package that is looked for."""


def check_library() -> None:
    """Raise a ValueError that says how to install Gradio where it is missing."""
    if importlib.util.find_spec(NAME) is None:
        raise ValueError('moesaic demo needs Gradio, which is not installed: pip install "moesaic[demo]"')
