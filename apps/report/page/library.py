"""The chart library that a page carries inside: Vega-Lite, which Altair describes and vl-convert brings along."""

from __future__ import annotations

import functools
import importlib.util

MISSING = (
    'the report has tables in place of charts: pip install "moesaic[report]" brings what draws them (altair, '
    "vl-convert-python)"
)
"""What the terminal and the page say where the library is not installed."""


def has_charts() -> bool:
    """Return whether charts can be drawn."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


@functools.cache
def script() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed, as ``window.vegaEmbed``: 0.9 MB, made once a process.

    It takes about 2 s.
    """
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
