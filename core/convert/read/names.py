"""Patterns of module names, as ``core.sparsify`` and ``core.add_adapters`` read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern names a module, part by part: ``*`` matches one name without dots.

    ``blocks.*.mlp`` matches ``blocks.0.mlp``, and neither ``blocks.0.attn.mlp`` nor ``teacher.blocks.0.mlp``. Within a
    part the pattern is one of ``fnmatch``: ``linear[12]``, ``expert_*``. The empty pattern names the model itself.
    """
    if not name or not pattern:
        return name == pattern
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def matching_names(
    model: nn.Module,
    patterns: str | Sequence[str],
    known: Iterable[str],
    noun: str,
    rule: Callable[[str, str], bool] = matches,
) -> list[str]:
    """Return the dotted names of the modules that the patterns name, in the model's order.

    A module in two places has two names.

    Args:
        model: any module.
        patterns: one pattern, or several.
        known: names that could have been meant, for the message.
        noun: what these are, in the plural.
        rule: whether a name matches a pattern; ``fnmatchcase``, whose ``*`` also takes dots, is another one.

    Raises:
        ValueError: a pattern is not text or names no module, or no pattern is given.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else []
    if not listed or not all(isinstance(pattern, str) for pattern in listed):
        raise ValueError(f"modules={patterns!r} is neither a pattern of module names nor a list of them")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in listed:
        if not any(rule(name, pattern) for name in names):
            meant = list(known)
            some = ", ".join(meant[:4]) + (", ..." if len(meant) > 4 else "") if meant else "none"
            raise ValueError(f"modules={pattern!r} names no module; the model's {noun} are {some}")
    return [name for name in names if any(rule(name, pattern) for pattern in listed)]
