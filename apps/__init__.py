"""The apps: vision, recommendation, translation and image with text, on one Lightning command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apps.train.checkpoint.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    """Import ``apps.load`` when it is asked for: it brings torch and Lightning, which the command line does without."""
    if name == "load":
        from apps.base.packages import shadowed

        if line := shadowed():
            raise ImportError(line)
        from apps.train.checkpoint.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
