"""HTML from templates that lie next to the modules that fill them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@functools.cache
def template(path: Path) -> Template:
    """Return a template of jinja2, with the macros of its folder. Every value in it is escaped, but for ``Markup``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(path.parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["named"] = lambda value, name: type(value).__name__ == name
    return environment.get_template(path.name)
