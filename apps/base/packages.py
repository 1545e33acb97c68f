"""The packages ``apps`` and ``core`` have common names: a folder of a user's may come before them on ``sys.path``."""

from __future__ import annotations

import importlib.util
import os

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def shadowed() -> str | None:
    """Return the line on another package that Python finds in place of ours; None: it finds ours.

    The file imports nothing of ours, so that it also runs by its path where ``apps`` itself is another package.
    """
    for name in ("apps", "core"):
        spec, own = importlib.util.find_spec(name), os.path.join(_ROOT, name)
        places = [] if spec is None else [*(spec.submodule_search_locations or (spec.origin or "",))]
        if own not in map(os.path.realpath, places):
            found = places[0] if places else "none"
            return f"the package {name} must be {own}, and Python finds {found}: rename that, or run in another folder"
    return None
