"""The packages ``apps`` and ``core`` have common names: a folder of a user's may come before them on ``sys.path``."""

from __future__ import annotations

import importlib.util
import os


def shadowed() -> str | None:
    """Return the line on another package that Python finds in place of ours; None: it finds ours."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for name in ("apps", "core"):
        spec, own = importlib.util.find_spec(name), os.path.join(root, name)
        places = [] if spec is None else [*(spec.submodule_search_locations or (spec.origin or "",))]
        if own not in map(os.path.realpath, places):
            found = places[0] if places else "none"
            return f"the package {name} must be {own}, and Python finds {found}: rename that, or run in another folder"
    return None
