"""The FFN of each block of a network: which blocks are sparse, the kind of each FFN, and how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor, nn

import core
from apps.nets.packing import Packing

FFNConfig = core.MoEConfig | core.DenseFFN
"""What the FFN of a block may be: both have ``build(dim, causal=...)`` and the same costs."""
MoEs = core.MoEConfig | Sequence[core.MoEConfig]
"""The MoE layer of all sparse blocks of a model, or one for each, from the first such block to the last."""


def moe_configs(moe: FFNConfig | MoEs | None) -> tuple[core.MoEConfig, ...]:
    """Return the different MoE layers of a model: one for all sparse blocks, one for each, or none.

    Raises:
        ValueError: an empty list, or one of other things.
    """
    if moe is None or isinstance(moe, core.DenseFFN):
        return ()
    if isinstance(moe, core.MoEConfig):
        return (moe,)
    if not isinstance(moe, Sequence) or not moe or not all(isinstance(one, core.MoEConfig) for one in moe):
        raise ValueError(f"moe={moe!r} is neither one MoEConfig nor a list of one for each sparse block")
    return tuple(moe)


@overload
def one_ffn(moe: core.MoEConfig | None, dense_ffn: core.DenseFFN | None) -> FFNConfig | None: ...


@overload
def one_ffn(moe: MoEs | None, dense_ffn: core.DenseFFN | None) -> FFNConfig | MoEs | None: ...


def one_ffn(moe: MoEs | None, dense_ffn: core.DenseFFN | None) -> FFNConfig | MoEs | None:
    """Return the FFN of a module's ``moe_blocks``; None: the FFN of the other blocks.

    Raises:
        ValueError: both are given, or as ``moe_configs``.
    """
    if moe is not None and dense_ffn is not None:
        raise ValueError(f"dense_ffn={dense_ffn} is for a dense model: with moe, set moe.expert")
    moe_configs(moe)
    return dense_ffn if moe is None else moe


def ffns_of(ffn: FFNConfig | MoEs | None, *stacks: Sequence[int]) -> list[list[FFNConfig]]:
    """Return the FFN of each sparse block of each stack: the same one, or the list's FFNs in turn.

    Args:
        ffn: of all sparse blocks, or a list with one for each; None: there is none.
        stacks: the sparse blocks of each stack, as an encoder's and then a decoder's.

    Raises:
        ValueError: the list has another length than there are sparse blocks.
    """
    num_blocks = sum(map(len, stacks))
    if ffn is None:
        return [[] for _ in stacks]
    if isinstance(ffn, FFNConfig):
        return [[ffn] * len(blocks) for blocks in stacks]
    configs = moe_configs(ffn)
    if len(configs) != num_blocks:
        named = " and ".join(str(list(blocks)) for blocks in stacks)
        raise ValueError(f"moe lists {len(configs)} layers for {num_blocks} sparse blocks, {named}: it needs one each")
    each = iter(configs)
    return [[next(each) for _ in blocks] for blocks in stacks]


def ffn_configs(
    dense: core.DenseFFN, depth: int, ffns: FFNConfig | MoEs | None, moe_blocks: Sequence[int]
) -> list[FFNConfig]:
    """Return the FFN of each of ``depth`` blocks: ``ffns`` in ``moe_blocks``, ``dense`` in the others.

    Raises:
        ValueError: as ``ffns_of``.
    """
    if ffns is None:
        return [dense] * depth
    own = dict(zip(moe_blocks, ffns_of(ffns, moe_blocks)[0], strict=True))
    return [own.get(i, dense) for i in range(depth)]


def share_experts(model: nn.Module, ffn: FFNConfig | MoEs | None) -> None:
    """Give all MoE layers of a model the experts of the first one, in place: one set of experts for all blocks
    (WideNet, arXiv 2107.11817). Each layer keeps its own router and gate on the shared experts, each block its norms.
    ``core.grow_experts`` is for layers that have experts of their own.

    Args:
        model: its MoE layers have one config.
        ffn: that config; a dense FFN, as in a baseline, is left as it is.

    Raises:
        ValueError: ``ffn`` is missing, or it is a list.
    """
    if ffn is None:
        raise ValueError("share_experts=True needs moe, whose experts all blocks share")
    if len(moe_configs(ffn)) > 1:
        raise ValueError("share_experts=True needs one moe for all blocks, not a list with one for each")
    first: core.MoE | None = None
    for layer in core.moe_layers(model).values():
        if not isinstance(layer, core.MoE):
            continue
        first = layer if first is None else first
        layer.experts, layer.shared_experts = first.experts, first.shared_experts


def feed(ffn: nn.Module, x: Tensor, context: core.RoutingContext, packing: Packing | None = None) -> Tensor:
    """Return the output of a block's FFN; an MoE layer reads the routing context besides.

    Args:
        ffn: an MoE layer or a dense FFN.
        x: (B, L, D), or (T, D) with ``packing``.
        context: of the (B, L) layout.
        packing: positions of the T tokens. An MoE layer gets them padded, as its router knows them by sequence; it does
            not compute padding.
    """
    if not isinstance(ffn, core.MoELayer):
        return ffn(x)
    return ffn(x, context) if packing is None else packing.pack(ffn(packing.pad(x), context))


def resolve_blocks(
    moe_blocks: str | Sequence[int], depth: int, *, option: str = "moe_blocks", optional: bool = False
) -> tuple[int, ...]:
    """Return the indices of the blocks whose FFN is replaced, ascending.

    Args:
        moe_blocks: "all"; "everyN": every N-th block, V-MoE's Every-N; "lastN": the last N of "every2", its Last-N;
            or indices, of which negative ones count from the end.
        depth: number of blocks.
        option: name of ``moe_blocks`` in messages.
        optional: "none" and no index at all are allowed, and name no block.

    Raises:
        ValueError: not one of these, an index out of range or twice, or N that does not fit the depth.

    Example::

        resolve_blocks("every2", 6)    # (1, 3, 5)
        resolve_blocks("last2", 6)     # (3, 5)
        resolve_blocks([-1], 6)        # (5,)
    """
    if not isinstance(moe_blocks, str):
        return () if optional and not moe_blocks else block_indices(moe_blocks, depth, option)
    if moe_blocks == "all":
        return tuple(range(depth))
    if moe_blocks == "none" and optional:
        return ()
    every = moe_blocks.startswith("every")
    rule, count = ("every", moe_blocks[5:]) if every else (moe_blocks[:4], moe_blocks[4:])
    if rule not in ("last", "every") or not (count.isascii() and count.isdigit()) or int(count) < 1:
        words = "'all' or 'none'" if optional else "'all'"
        raise ValueError(
            f"{option}={moe_blocks!r} is not lastN or everyN (N at least 1), {words}, nor a list of indices"
        )
    n = int(count)
    # As in the paper's code (arXiv 2106.05974): Every-N is range(N - 1, depth, N), Last-N the end of Every-2.
    chosen = list(range(n - 1, depth, n)) if every else list(range(1, depth, 2))[-n:]
    most = depth if every else depth // 2
    if n > most:
        raise ValueError(f"{option}={moe_blocks!r} does not fit depth={depth}: N is at most {most}")
    return tuple(chosen)


def block_indices(moe_blocks: Sequence[int], depth: int, option: str = "moe_blocks") -> tuple[int, ...]:
    """Return the named blocks, ascending; negative numbers count from the end.

    Raises:
        ValueError: no number, one out of range or twice.
    """
    if not moe_blocks:
        raise ValueError(f"{option}=[] names no block: name one, or leave moe out for a dense model")
    for index in moe_blocks:
        if not -depth <= index < depth:
            raise ValueError(f"{option} index {index} is out of range for depth={depth}")
    chosen = sorted(index % depth for index in moe_blocks)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{option}={list(moe_blocks)} names a block twice (depth={depth})")
    return tuple(chosen)
