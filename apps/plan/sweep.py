"""All layouts of a number of GPUs: the best one for each expert-parallel degree, and where it breaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apps.plan.formulas import SHARDINGS
from apps.plan.layout import Cost, Layout, cost
from apps.plan.options import Options
from apps.plan.outline import Outline
from core.parallel import refusal


@dataclass(frozen=True)
class Sweep:
    """The layouts of a number of GPUs.

    Attributes:
        costs: the best layout of each expert-parallel degree and of each way to shard tables, by degree.
        best: the fastest that fits; where none fits, the one with the least memory.
    """

    costs: tuple[Cost, ...]
    best: Cost

    def breaks(self) -> list[str]:
        """Return a line for each limit: where memory does not fit, and where exchange exceeds compute."""
        large = [_name(c) for c in self.costs if not c.fits]
        slow = [_name(c) for c in self.costs if c.exchange > c.compute]
        return [
            f"memory does not fit at {', '.join(large)}" if large else "memory fits everywhere",
            f"exchange exceeds compute at {', '.join(slow)}" if slow else "exchange takes less than compute everywhere",
        ]


def _name(one: Cost) -> str:
    return f"degree {one.layout.degree}" if one.sharding is None else one.sharding


def sweep(outline: Outline, options: Options) -> Sweep:
    """Return the cost of all layouts of ``options.gpus``, the best of each expert-parallel degree and of each way to
    shard tables."""
    shardings: Sequence[str | None] = SHARDINGS if outline.tables else (None,)
    by_name: dict[tuple[int, str | None], Cost] = {}
    for layout in layouts(outline, options.gpus, options.node):
        for sharding in shardings:
            new, name = cost(outline, options, layout, sharding), (layout.degree, sharding)
            by_name[name] = min(by_name.get(name, new), new, key=_rank)
    costs = tuple(sorted(by_name.values(), key=lambda c: c.layout.degree))
    return Sweep(costs, min(costs, key=_rank))


def _rank(one: Cost) -> tuple[bool, float, float]:
    """Return what orders costs: those that fit by time, the others by memory."""
    return (not one.fits, one.seconds if one.fits else one.memory.total, one.seconds)


def layouts(outline: Outline, gpus: int, node: int) -> Iterator[Layout]:
    """Yield the meshes of so many GPUs on nodes of ``node``. Beside tables of TorchRec's all else is copied."""
    if outline.tables:
        yield Layout(replicas=gpus)
        return
    for nodes, experts, hidden in _divisions(outline, gpus, node):
        left = gpus // (nodes * experts * hidden)
        yield Layout(replicas=left, nodes=nodes, experts=experts, hidden=hidden)
        for shards in divisors(left):
            yield Layout(left // shards, shards, nodes, experts, hidden, "shard")


def _divisions(outline: Outline, gpus: int, node: int) -> Iterator[tuple[int, int, int]]:
    """Yield the ways to share out the experts: nodes, ranks of each, and ranks that share out an expert's units."""
    yield 1, 1, 1
    if not outline.layers:
        return
    possible = [n for n in divisors(gpus) if not any(refusal(m.module, n) for m in outline.layers.values())]
    most = max(possible, default=1)
    for parts in possible:
        if parts > 1:
            yield 1, parts, 1
            if parts > node and parts % node == 0:
                yield parts // node, node, 1
        # An expert is cut where there are more ranks than experts, and not before.
        for hidden in divisors(gpus // parts)[1:] if parts == most else ():
            if any(refusal(layer.module, parts, hidden) for layer in outline.layers.values()):
                continue
            yield 1, parts, hidden
            each = node // hidden  # parts of the experts on each node
            if parts * hidden > node == each * hidden and parts % each == 0:
                yield parts // each, each, hidden


def divisors(number: int) -> list[int]:
    """Return the numbers that divide ``number``, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def over_gpus(outline: Outline, options: Options) -> list[tuple[int, Cost]]:
    """Return the best layout for other numbers of GPUs, from one node to four times those of the command, by number.

    Each GPU has the same examples.
    """
    counts: Sequence[int] = sorted({*_doubling(options), options.gpus})
    return [(n, sweep(outline, dataclasses.replace(options, gpus=n)).best) for n in counts]


def _doubling(options: Options) -> Iterator[int]:
    n = options.gpus_per_node if options.gpus >= options.gpus_per_node else 1
    while n <= 4 * options.gpus:
        if n <= options.gpus_per_node or n % options.gpus_per_node == 0:
            yield n
        n *= 2
