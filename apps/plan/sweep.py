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
        costs: the best layout of each expert-parallel degree, by degree.
        best: the fastest that fits; where none fits, the one with the least memory.
    """

    costs: tuple[Cost, ...]
    best: Cost

    def breaks(self) -> list[str]:
        """Return a line for each limit: degrees at which memory does not fit, and those at which exchange exceeds
        compute."""
        lines = []
        large = [c.layout.degree for c in self.costs if not c.fits]
        if large:
            lines.append(f"memory does not fit at expert-parallel degree {', '.join(map(str, large))}")
        else:
            lines.append("memory fits at every expert-parallel degree")
        slow = next((c for c in self.costs if c.exchange > c.compute), None)
        if slow is None:
            lines.append("exchange takes less than compute at every degree")
        else:
            lines.append(f"exchange exceeds compute from degree {slow.layout.degree} on")
        return lines


def sweep(outline: Outline, options: Options) -> Sweep:
    """Return the cost of all layouts of ``options.gpus``, the best of each expert-parallel degree."""
    shardings: Sequence[str | None] = SHARDINGS if outline.tables else (None,)
    by_degree: dict[int, Cost] = {}
    for layout in layouts(outline, options.gpus, options.node):
        for sharding in shardings:
            new = cost(outline, options, layout, sharding)
            old = by_degree.get(layout.degree)
            by_degree[layout.degree] = new if old is None else min(old, new, key=_rank)
    costs = tuple(by_degree[degree] for degree in sorted(by_degree))
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
            if not any(refusal(layer.module, parts, hidden) for layer in outline.layers.values()):
                yield 1, parts, hidden


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
    n = options.per_node if options.gpus >= options.per_node else 1
    while n <= 4 * options.gpus:
        if n <= options.per_node or n % options.per_node == 0:
            yield n
        n *= 2
