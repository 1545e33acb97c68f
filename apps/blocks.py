"""Which blocks of a network have MoE layers, where a configuration names them by number."""

from __future__ import annotations

from collections.abc import Sequence


def block_indices(moe_blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """The named blocks, ascending; negative numbers count from the end.

    Raises:
        ValueError: no number, one out of range or twice.
    """
    if not moe_blocks:
        raise ValueError("moe_blocks=[] names no block: name one, or leave moe out for a dense model")
    for index in moe_blocks:
        if not -depth <= index < depth:
            raise ValueError(f"moe_blocks index {index} is out of range for depth={depth}")
    chosen = sorted(index % depth for index in moe_blocks)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"moe_blocks={list(moe_blocks)} names a block twice (depth={depth})")
    return tuple(chosen)
