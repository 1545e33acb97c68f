"""The cost of a training step on one layout of a mesh, and the best layout for each expert-parallel degree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from apps.plan import formulas
from apps.plan.options import PlanOptions
from apps.plan.outline import Block, Layer, Outline
from core.parallel import refusal

_INDEX_BYTES = 48
"""Bytes of the indices that the all-to-all keeps for a row, six of int64."""


@dataclass(frozen=True)
class Layout:
    """A mesh of replicas x shards x experts, as ``ExpertParallelStrategy`` takes it.

    Attributes:
        replicas: copies of the model.
        shards: groups of ranks among which parameters are sharded further.
        nodes: machines that share out the experts, with an all-to-all within each first.
        experts: ranks that share out the experts, on each of these machines.
        hidden: ranks that share out the hidden units of each expert.
        rest: "replicate" or "shard": treatment of all other parameters.
    """

    replicas: int = 1
    shards: int = 1
    nodes: int = 1
    experts: int = 1
    hidden: int = 1
    rest: str = "replicate"

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of its dimensions."""
        return self.replicas, self.shards, self.nodes, self.experts, self.hidden

    @property
    def degree(self) -> int:
        """The expert-parallel degree: ranks over which a layer's experts, and their hidden units, are sharded."""
        return self.nodes * self.experts * self.hidden

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.replicas * self.shards * self.degree

    @property
    def rest_ranks(self) -> int:
        """Ranks among which all other parameters are sharded."""
        return self.shards * self.degree if self.rest == "shard" else 1


@dataclass(frozen=True)
class Cost:
    """The cost of a step on a layout.

    Attributes:
        layout: the mesh.
        memory: of a rank at the step's peak.
        traffic: of a rank in a step, by collective.
        compute: seconds of the matmuls.
        exchange: seconds of the MoE layers' all-to-alls, of the tables' all-to-all and of the balance losses' sums.
        data: seconds of gathering parameters and reducing gradients.
        seconds: of the step.
        fits: whether the memory is there.
        sharding: how TorchRec shards the tables; None: there are none.
    """

    layout: Layout
    memory: formulas.Memory
    traffic: Mapping[str, formulas.Traffic]
    compute: float
    exchange: float
    data: float
    seconds: float
    fits: bool
    sharding: str | None = None

    @property
    def share(self) -> float:
        """The all-to-all's share of the step."""
        return self.exchange / self.seconds


def cost(outline: Outline, options: PlanOptions, layout: Layout, sharding: str | None = None) -> Cost:
    """Return the cost of a step on a layout.

    Args:
        outline: the model.
        options: of the command.
        layout: of all ``options.gpus``.
        sharding: of the tables, one of ``formulas.SHARDINGS``; None: there are none.
    """
    memory = _memory(outline, options, layout, sharding)
    traffic = _traffic(outline, options, layout, sharding)
    gpu = options.gpu
    compute = formulas.step_flops(outline.flops, options.checkpointing) / (options.rate * options.efficiency)
    seconds = {name: t.seconds(gpu.within, gpu.between, options.latency) for name, t in traffic.items()}
    exchange = sum(seconds[name] for name in ("experts", "tables", "balance"))
    data = seconds["gradients"] + seconds["parameters"]
    return Cost(
        layout=layout,
        memory=memory,
        traffic=traffic,
        compute=compute,
        exchange=exchange,
        data=data,
        seconds=formulas.step_seconds(compute, exchange, data),
        fits=memory.total <= options.usable_memory * gpu.memory,
        sharding=sharding,
    )


# ---- memory


def _memory(outline: Outline, options: PlanOptions, layout: Layout, sharding: str | None) -> formulas.Memory:
    experts, rest, size = layout.degree * layout.shards, layout.rest_ranks, options.stored_bytes
    weights = optimizer = 0.0
    step = 0.0
    for block in outline.parts:
        params = block.rest.params / rest + block.experts.params / experts
        weights += size * params
        optimizer += size * (block.rest.state / rest + block.experts.state / experts)
        optimizer += size * params * outline.averaged
        step = max(step, size * block.rest.step / rest, size * block.experts.step / experts)
    if sharding is not None:
        sizes = [(t.rows, t.dim, t.state) for t in outline.tables]
        weights += formulas.tables_bytes(sizes, formulas.group(options.gpus, 1, options.node), sharding)
    root, *blocks = (_part(block, outline, options, layout) for block in outline.parts)
    return formulas.peak_memory(weights, optimizer, root, blocks, step)


def _part(block: Block, outline: Outline, options: PlanOptions, layout: Layout) -> formulas.Part:
    """Return a block as one rank has it."""
    over, rest = layout.degree * layout.shards, layout.rest_ranks
    experts = block.experts.params / layout.degree
    layers = [outline.layers[name] for name in block.layers]
    kept = block.kept + sum(_kept_by_exchange(layer, options, layout) for layer in layers)
    kept += 2 * experts * options.autocast  # its copies in bfloat16 stay for the backward
    working = max(block.working, *(_working(layer, options, layout) for layer in layers), 0.0)
    checkpointed = options.checkpointing and bool(block.name)
    unit = max(block.rest.trainable, block.experts.trainable / layout.degree)
    buffer = max(block.rest.params * (rest > 1), experts * (layout.shards > 1))
    return formulas.Part(
        activations=block.entering if checkpointed else kept,
        gradients=options.stored_bytes * (block.rest.trainable / rest + block.experts.trainable / over),
        whole=options.gathered_bytes * (block.rest.params + experts),
        buffer=options.gathered_bytes * buffer,
        whole_gradients=options.gathered_bytes * unit,
        reduced=options.stored_bytes * unit,
        again=kept if checkpointed else 0.0,
        working=working,
    )


def _kept_by_exchange(layer: Layer, options: PlanOptions, layout: Layout) -> float:
    """Return the bytes that sharded experts keep in addition to local ones: the rows that come in, and indices."""
    if layout.degree == 1:
        return 0.0
    return layer.rows * layout.hidden * (layer.dim * options.dtype_bytes + _INDEX_BYTES)


def _working(layer: Layer, options: PlanOptions, layout: Layout) -> float:
    """Return the temporary bytes of a layer: rows as they are sent, come back and are put in order, and the gradients
    of the experts' saved activations."""
    sent = 0.0
    if layout.degree > 1:
        width = layer.dim + (1 + layout.hidden) * layer.out_dim
        sent = layer.rows * width * options.dtype_bytes
    return sent + layer.kept


# ---- traffic


def _traffic(
    outline: Outline, options: PlanOptions, layout: Layout, sharding: str | None
) -> dict[str, formulas.Traffic]:
    """Return the traffic of a rank in a step, by collective."""
    node, W = options.node, options.gpus
    experts = formulas.Traffic()
    passes = 2 if options.checkpointing else 1
    for layer in outline.layers.values():
        if layout.degree > 1:
            moved = formulas.exchanged_bytes(layer.rows, layer.dim, layer.out_dim, options.dtype_bytes, passes)
            moved += passes * formulas.count_bytes(layer.num_experts)
            one = formulas.all_to_all(moved, layout.experts, layout.hidden, layout.nodes, node)
            # Counts, rows there with their gates, and rows back are separate all-to-alls; so are their gradients.
            experts += formulas.Traffic(one.within, one.between, one.messages * (passes * 4 + 3))
    tables, everyone = formulas.Traffic(), formulas.group(W, 1, node)
    if sharding is not None:
        B, columns = outline.trial.examples, len(outline.tables)
        tables = formulas.pooled(B, sum(t.dim for t in outline.tables), columns, everyone, sharding)
        tables += formulas.ids(B, columns, options.pooling, everyone, sharding)
    numbers = sum(2 * layer.num_experts + 1 for layer in outline.layers.values())
    gradients, parameters = _data(outline, options, layout)
    return {
        "experts": experts,
        "tables": tables,
        "balance": formulas.all_reduce(4.0 * numbers, everyone) if numbers else formulas.Traffic(),
        "gradients": gradients,
        "parameters": parameters,
    }


def _data(outline: Outline, options: PlanOptions, layout: Layout) -> tuple[formulas.Traffic, formulas.Traffic]:
    """Return the traffic of reducing gradients and of gathering parameters."""
    node, degree = options.node, layout.degree
    rest = formulas.group(layout.rest_ranks, 1, node)
    copies = formulas.group(layout.ranks // layout.rest_ranks, layout.rest_ranks, node)
    shards = formulas.group(layout.shards, degree, node)
    replicas = formulas.group(layout.replicas, degree * layout.shards, node)
    gradients = parameters = formulas.Traffic()
    for block in outline.parts:
        # Parameters outside all blocks stay gathered; blocks are gathered again for the backward.
        times = 2 if block.name else 1
        for numbers, whole, among, copied in (
            (block.rest, 1, rest, copies),
            (block.experts, degree, shards, replicas),
        ):
            sent = options.stored_bytes * numbers.trainable / whole
            gradients += formulas.reduce_scatter(sent, among) if sent else formulas.Traffic()
            gradients += formulas.all_reduce(sent / among.ranks, copied) if sent else formulas.Traffic()
            got = options.gathered_bytes * numbers.params / whole
            parameters += formulas.all_gather(got, among).times(times) if got else formulas.Traffic()
    return gradients, parameters


def hidden_units(layer: Layer) -> int:
    """Return the hidden units of a layer's experts that ranks may share out; 1 if they cannot be."""
    sizes = [
        tensor.shape[part.hidden_axes[key]]
        for part in layer.module.experts.modules()
        for key, tensor in part.named_parameters(recurse=False)
        if key in getattr(part, "hidden_axes", {})
    ]
    return math.gcd(*sizes) if sizes else 1


@dataclass(frozen=True)
class Sweep:
    """The layouts of a number of GPUs.

    Attributes:
        costs: the best layout of each expert-parallel degree and of each way to shard tables, by degree.
        best: the fastest that fits; if none fits, the one with the least memory.
    """

    costs: tuple[Cost, ...]
    best: Cost

    def breaks(self) -> list[str]:
        """Return a line for each limit: memory that does not fit, or an all-to-all slower than compute."""
        large = [_name(c) for c in self.costs if not c.fits]
        slow = [_name(c) for c in self.costs if c.exchange > c.compute]
        return [
            f"memory does not fit at {', '.join(large)}" if large else "memory fits everywhere",
            f"all-to-all exceeds compute at {', '.join(slow)}" if slow else "all-to-all is below compute everywhere",
        ]


def _name(one: Cost) -> str:
    return f"degree {one.layout.degree}" if one.sharding is None else one.sharding


def sweep(outline: Outline, options: PlanOptions) -> Sweep:
    """Return the cost of all layouts of ``options.gpus``, the best of each expert-parallel degree and of each way to
    shard tables."""
    shardings: Sequence[str | None] = formulas.SHARDINGS if outline.tables else (None,)
    by_name: dict[tuple[int, str | None], Cost] = {}
    for layout in layouts(outline, options.gpus, options.node):
        for sharding in shardings:
            new, name = cost(outline, options, layout, sharding), (layout.degree, sharding)
            by_name[name] = min(by_name.get(name, new), new, key=_rank)
    costs = tuple(sorted(by_name.values(), key=lambda c: c.layout.degree))
    return Sweep(costs, min(costs, key=_rank))


def _rank(one: Cost) -> tuple[bool, float, float]:
    """Return the sort key of costs: time for layouts that fit, memory for the others."""
    return (not one.fits, one.seconds if one.fits else one.memory.total, one.seconds)


def layouts(outline: Outline, gpus: int, node: int) -> Iterator[Layout]:
    """Yield the meshes of this many GPUs on nodes of ``node``. With TorchRec's tables all else is replicated."""
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
