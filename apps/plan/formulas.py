"""Formulas of a plan: the memory, the traffic and the time of a training step, as pure functions of plain numbers.

Sizes are in bytes, times in seconds, rates in bytes or FLOPs per second. Traffic is what *leaves* one rank in a step;
as much arrives. docs/concepts/planning.md has the same formulas with worked examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The peak figures of a GPU.

    Attributes:
        memory: bytes.
        half: FLOP/s of dense matmuls in bfloat16.
        tf32: FLOP/s of dense matmuls of float32 numbers in TF32.
        single: FLOP/s of dense matmuls in float32, without TF32.
        within: bytes per second that leave it for GPUs of its node.
        between: bytes per second that leave it for other nodes.
    """

    memory: float
    half: float
    tf32: float
    single: float
    within: float
    between: float


# NVIDIA's data sheets of A100 (SXM, 80 GB), H100 (SXM), H200 (SXM) and HGX B200, and AMD's of MI300X: dense matmuls,
# without sparsity. A link's figure there counts both directions: NVLink 600, 900, 900 and 1800 GB/s, Infinity Fabric
# 896 GB/s. Between nodes a network port of each GPU: 200 Gb/s in DGX A100, 400 Gb/s in the others' reference machines.
GPUS = {
    "a100": Gpu(80e9, 312e12, 156e12, 19.5e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 494.5e12, 67e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 494.5e12, 67e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 1125e12, 75e12, 900e9, 50e9),
    "mi300x": Gpu(192e9, 1307e12, 653.5e12, 163.4e12, 448e9, 50e9),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave one rank.

    Attributes:
        within: bytes for ranks of the same node.
        between: bytes for ranks of other nodes.
        messages: number of messages: one per destination rank, or one per step of a ring.
    """

    within: float = 0.0
    between: float = 0.0
    messages: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.within + other.within, self.between + other.between, self.messages + other.messages)

    def times(self, factor: float) -> Traffic:
        """Return the traffic of ``factor`` such collectives."""
        return Traffic(factor * self.within, factor * self.between, factor * self.messages)

    @property
    def total(self) -> float:
        """Bytes for all other ranks."""
        return self.within + self.between

    def seconds(self, within: float, between: float, latency: float) -> float:
        """Return the time of the traffic, its parts one after the other.

        Args:
            within, between: bytes per second that leave one rank for its node and for other nodes.
            latency: seconds of one message.
        """
        return self.within / within + self.between / between + self.messages * latency


@dataclass(frozen=True)
class Group:
    """The ranks of one collective, as they lie on nodes.

    Attributes:
        ranks: number of ranks.
        per_node: number of these ranks on each node that has any; it divides ``ranks``.
    """

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.ranks // self.per_node


def group(ranks: int, stride: int, node: int) -> Group:
    """Return how every ``stride``-th rank, ``ranks`` of them, lie on nodes of ``node`` neighboring ranks each."""
    per_node = max(min(ranks, node // stride), 1)
    while ranks % per_node:
        per_node -= 1
    return Group(ranks, per_node)


def reduce_scatter(size: float, over: Group) -> Traffic:
    """Return the traffic of a sum of ``size`` bytes whose parts stay on the ranks, first within nodes.

    A rank of W sends ``size (W - 1) / W`` in all: g neighbors on a node reduce a g-th each, ``size (g - 1) / g``, which
    the N nodes then reduce among them, ``size / g (N - 1) / N``.
    """
    g, N = over.per_node, over.nodes
    return Traffic(size * (g - 1) / g, size / g * (N - 1) / N, over.per_node - 1 + N - 1)


def all_gather(size: float, over: Group) -> Traffic:
    """Return the traffic of gathering ``size`` bytes in all of which each rank has a part: a ``reduce_scatter``'s."""
    return reduce_scatter(size, over)


def all_reduce(size: float, over: Group) -> Traffic:
    """Return the traffic of a sum of ``size`` bytes on every rank, ``2 size (W - 1) / W`` in all."""
    return reduce_scatter(size, over).times(2)


def all_to_all(size: float, experts: int, hidden: int, nodes: int, node: int) -> Traffic:
    """Return the traffic of one all-to-all of rows, in which each of P ranks has ``size / P`` for each.

    Each row goes to all ``hidden`` ranks that have a part of its expert. One all-to-all of P ranks sends
    ``hidden size (P - 1) / P``, of which ``(g - 1) / P`` stays on a node of g ranks. With ``nodes``, rows go to a
    neighbor first, ``hidden size (M - 1) / M`` for M = experts hidden ranks of a node, and from there to another node,
    ``hidden size (N - 1) / N``.

    Args:
        size: bytes of a rank's rows.
        experts: ranks over which experts are sharded, on each of ``nodes``.
        hidden: ranks over which the hidden units of each expert are sharded.
        nodes: machines that share out the experts by a two-level all-to-all; 1: one level.
        node: ranks of a node.
    """
    sent, M = hidden * size, experts * hidden
    if nodes > 1:
        return Traffic(sent * (M - 1) / M, sent * (nodes - 1) / nodes, M - 1 + nodes - 1)
    near = min(M, node)
    return Traffic(sent * (near - 1) / M, sent * (M - near) / M, M - 1)


def exchanged_bytes(rows: float, dim: int, out_dim: int, dtype_bytes: int, passes: int = 1) -> float:
    """Return the bytes of a rank's rows in all all-to-alls of an MoE layer in a step.

    Forward, a row of ``dim`` numbers and its gate (float32) go to the experts, and ``out_dim`` numbers come back;
    backward, their gradients take the same way in the other direction. Rows are in the dtype of the matmuls.

    Args:
        rows: routed pairs of a rank, tokens times experts per token.
        dim, out_dim: width of a row to and from the experts.
        dtype_bytes: bytes of a number.
        passes: forwards in a step: 1, or 2 if activations are recomputed in the backward.
    """
    return (passes + 1) * rows * ((dim + out_dim) * dtype_bytes + 4)


def count_bytes(num_experts: int) -> float:
    """Return the bytes of a rank's numbers of rows for each expert, int64, which go before each layer's rows."""
    return 8.0 * num_experts


def step_flops(forward: float, checkpointed: bool) -> float:
    """Return the FLOPs of a step: the backward takes twice the forward, and checkpointing a second forward."""
    return (4 if checkpointed else 3) * forward


@dataclass(frozen=True)
class Part:
    """A part of a model on one rank: a block, whose units FSDP2 gathers and frees, or the parameters outside all
    blocks.

    A block's units are its sharded experts and the rest of it. If there is one of each they are reduced one after the
    other, so that the larger one counts.

    Attributes:
        activations: bytes that its forward keeps for the backward.
        gradients: bytes of its gradients that stay on the rank.
        whole: bytes of its parameters while they are gathered.
        buffer: bytes of the all-gather's buffer, which is there while parameters are copied out of it.
        whole_gradients: bytes of a unit's gradients before they are reduced.
        reduced: bytes of the buffer in which they are reduced.
        again: bytes that its backward recomputes, with activation checkpointing.
        working: bytes of temporary tensors, such as the buffers of an all-to-all.
    """

    activations: float = 0.0
    gradients: float = 0.0
    whole: float = 0.0
    buffer: float = 0.0
    whole_gradients: float = 0.0
    reduced: float = 0.0
    again: float = 0.0
    working: float = 0.0


@dataclass(frozen=True)
class Memory:
    """The bytes that one rank holds at the peak of a step.

    Attributes:
        weights: parameters that stay here.
        gradients: their gradients.
        optimizer: its state, and a moving average of the weights.
        activations: saved activations.
        temporary: gathered parameters, gradients in flight, buffers of the all-to-all, less the bytes that are not
            there at the same time; below zero where the other four are never there together.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def peak_memory(weights: float, optimizer: float, root: Part, blocks: Sequence[Part], step: float) -> Memory:
    """Return the memory of a rank at the peak of a step, by the tensors alive at each moment.

    - In the forward of a block: the activations up to it, its gathered parameters, with the buffer that they are copied
      out of, and the gradients of the step before, which Lightning frees after the forward.
    - In the backward of a block: the activations up to it, the gradients of the blocks behind it, its own parameters
      and gradients, and the buffer in which the gradients of the block behind it are reduced; or, its parameters freed,
      its gradients and their own buffer.
    - In the optimizer's step: all gradients, and the step's temporaries.

    Parameters outside all blocks stay gathered from the forward's start to the backward's end.

    Args:
        weights: bytes of the parameters that stay here.
        optimizer: bytes of the optimizer's state.
        root: the parameters outside all blocks.
        blocks: in the order of the forward.
        step: temporary bytes of the optimizer's step.
    """
    gradients = root.gradients + sum(b.gradients for b in blocks)
    activations = root.activations + sum(b.activations for b in blocks)
    kept, before = root.whole + root.activations, 0.0
    behind = gradients - root.gradients
    moments = [gradients + step]
    for i, block in enumerate(blocks):
        behind -= block.gradients
        alive = kept + before + block.activations + block.working
        moments.append(alive + gradients + block.whole + block.buffer)
        following = blocks[i + 1].reduced if i + 1 < len(blocks) else 0.0
        computing = block.whole + block.buffer + block.whole_gradients + following
        reducing = block.whole_gradients + block.reduced + block.gradients
        moments.append(alive + block.again + behind + max(computing, reducing))
        before += block.activations
    moments.append(kept + before + root.working + gradients)
    moments.append(root.whole + gradients + root.whole_gradients + root.reduced)
    return Memory(weights, gradients, optimizer, activations, max(moments) - gradients - activations)


def step_seconds(compute: float, exchange: float, data: float) -> float:
    """Return the time of a step: the all-to-alls block, and FSDP2's communication overlaps with compute.

    Args:
        compute: seconds of the matmuls.
        exchange: seconds of the all-to-alls of the MoE layers, and of the small sums of the balance losses.
        data: seconds of gathering parameters and reducing gradients.
    """
    return max(compute, data) + exchange


SHARDINGS = ("table_wise", "table_row_wise", "row_wise")
"""TorchRec's ways of sharding a table: whole on a rank, by rows over the ranks of a node, by rows over all ranks."""


def holders(over: Group, sharding: str) -> int:
    """Return the ranks that share out a table."""
    return {"table_wise": 1, "table_row_wise": over.per_node, "row_wise": over.ranks}[sharding]


def tables_bytes(tables: Sequence[tuple[int, int, int]], over: Group, sharding: str) -> float:
    """Return the bytes of the tables, in float32, and of their optimizer's state, on the rank that holds most.

    Tables are spread evenly, and one that is larger than an even part counts whole.

    Args:
        tables: rows, numbers of a row, and numbers that the optimizer keeps for a row: 1 of rowwise Adagrad, as many
            as the row has of Adagrad, twice as many of Adam.
        over: all ranks.
        sharding: one of ``SHARDINGS``.
    """
    sizes = [4.0 * rows * (dim + state) for rows, dim, state in tables]
    ranks = holders(over, sharding)
    return max(max(sizes, default=0.0) / ranks, sum(sizes) / over.ranks)


def pooled(examples: int, dim: int, columns: int, over: Group, sharding: str) -> Traffic:
    """Return the traffic of pooled embeddings and of their gradients, float32, of a rank that holds tables.

    Whole tables: each of B examples of a rank gets its vectors once, ``2 x 4 B H (W - 1) / W``. Rows on all ranks: each
    rank sends a partial sum for every example of the global batch, ``2 x 4 B H (W - 1)``. Rows on a node of G ranks:
    ``2 x 4 B H (G - 1)`` within it, and the sums to n nodes, ``2 x 4 B H (n - 1) / n``. Where fewer than all ranks hold
    tables, each of these sends the part of several.

    Args:
        examples: B, a rank's examples.
        dim: H, numbers of an example's vectors side by side.
        columns: tables.
        over: all ranks.
        sharding: one of ``SHARDINGS``.
    """
    W, g, n = over.ranks, over.per_node, over.nodes
    size = 8.0 * examples * dim * W / min(columns * holders(over, sharding), W)
    if sharding == "row_wise":
        return Traffic(size * (g - 1), size * (W - g), 2 * (W - 1))
    if sharding == "table_row_wise":
        return Traffic(size * (g - 1), size * (n - 1) / n, 2 * (g + n - 2))
    return Traffic(size * (g - 1) / W, size * (W - g) / W, 2 * (W - 1))


def ids(examples: int, columns: int, pooling: int, over: Group, sharding: str) -> Traffic:
    """Return the traffic of ids (8 bytes each) and of their numbers (4 bytes), ``B F (8 L + 4 h) (W - 1) / W``.

    Args:
        examples: B, a rank's examples.
        columns: F.
        pooling: L, ids of a column in an example.
        over: all W ranks.
        sharding: one of ``SHARDINGS``; h ranks share out a table.
    """
    W, g = over.ranks, over.per_node
    size = float(examples * columns * (8 * pooling + 4 * holders(over, sharding)))
    return Traffic(size * (g - 1) / W, size * (W - g) / W, W - 1)
