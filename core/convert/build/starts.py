"""Initial experts of a sparse layer, given the feed-forward network that it replaces.

A start is a config with three methods: ``config`` says which experts the layer has, ``total_gate`` gives the required
sum of a token's gates, and ``fill`` writes the experts' weights and, if the method asks for it, the rows of the gate.
``core.sparsify`` does the common part: it scales the outputs of experts if the gates sum to another number, and adds
noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...config import MoEConfig
from ...experts import FFN
from ...fields import CountOrZero, Share
from ...layers import MoE
from ...registry import OpenConfig
from ...routing.gates import LinearGate
from ..measure.widths import widened
from ..read.feed_forward import FeedForwardPart, copy_weights
from ..read.neurons import activity_of, balanced_clusters, keys_of, random_groups


@dataclass(frozen=True)
class Start(OpenConfig):
    """Base of the starts. A subclass has a ``name``, ``fill``, and if it needs them ``config`` and ``total_gate``.

    Attributes:
        keeps_output: the sparse layer starts with the output of the dense network, if the gates allow it.
        even_gates: this holds only if all gates of a token are equal.
        divides: experts are narrower than the network, so that ``granularity`` has a meaning.
        reads: argument of ``sparsify`` that ``fill`` reads, "inputs" or "importances"; "": none.
    """

    name: ClassVar[str] = ""
    keeps_output: ClassVar[bool] = True
    even_gates: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    @property
    def reads(self) -> str:
        return ""

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        """Return the config of the layer: ``moe`` with experts of the network's kind and width.

        Raises:
            ValueError: ``moe.expert`` is set, or another option does not go with this start.
        """
        if moe.expert != FFN():
            raise ValueError(
                f"expert={moe.expert}: with start={self.name!r} experts are as the network, {part.expert}: leave "
                "moe.expert at its default, or give start='random'"
            )
        if moe.granularity > 1 and not self.divides:
            raise ValueError(
                f"granularity={moe.granularity} makes experts narrower than the network: not with start={self.name!r}"
            )
        if moe.num_shared_experts and (moe.num_shared_experts > 1 or moe.shared_gate != "mix" or moe.shared_expert):
            raise ValueError(
                f"num_shared_experts={moe.num_shared_experts} with shared_gate={moe.shared_gate!r} adds to the "
                f"network's output: start={self.name!r} takes one shared expert of the same kind by shared_gate='mix'"
            )
        shared = part.expert if moe.num_shared_experts else None
        return replace(moe, expert=part.expert, shared_expert=shared)

    def total_gate(self, part: FeedForwardPart, layer: MoE) -> float:
        """Return the sum that a token's gates must have for the layer's output to equal the network's."""
        return 1.0

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        """Write the weights of the routed experts, in place; gradients are off.

        Args:
            part: the network.
            layer: the layer of ``config``, on the network's device and in its dtype.
            generator: CPU generator for random values.
            known: what ``reads`` names: of "inputs", the tokens (T, D) that the network was called with; of
                "importances", one value per hidden unit (F,). None: nothing is read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CopyStart(Start):
    """Every expert is a copy of the network: sparse upcycling (arXiv 2212.05055)."""

    name = "copy"

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        for e in range(layer.num_experts):
            copy_weights(layer.experts, e, part.weights)


@dataclass(frozen=True)
class DropStart(Start):
    """Copies, in each of which a share of the hidden units is reinitialized (Drop-Upcycling, arXiv 2502.19261).

    The units differ from expert to expert. Their columns of ``w_in`` and ``w_gate`` and their rows of ``w_out`` are
    sampled from a normal distribution with the mean and standard deviation of their old values; biases stay.

    Attributes:
        ratio: share of the units. The paper finds 0.5 best.

    Raises:
        ValueError: ``ratio`` is not in [0, 1].
    """

    name = "drop"

    ratio: Share = 0.5

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        F = part.hidden_dim
        for e in range(layer.num_experts):
            copy_weights(layer.experts, e, part.weights)
            unit_N = torch.randperm(F, generator=generator)[: round(self.ratio * F)]
            for name, tensor in layer.experts.weights_of(e).items():
                if tensor.ndim != 2 or not unit_N.numel():
                    continue
                axis = 0 if name == "w_out" else 1
                old = tensor.index_select(axis, unit_N.to(tensor.device)).float()
                drawn = torch.randn(old.shape, generator=generator).to(old.device) * old.std(correction=0) + old.mean()
                tensor.index_copy_(axis, unit_N.to(tensor.device), drawn.to(tensor.dtype))


@dataclass(frozen=True)
class GranularStart(Start):
    """Narrow experts in virtual groups (arXiv 2410.07524): ``MoEConfig(E, TokenChoice(K), granularity=g)``.

    The network's hidden units are cut into g shards. There are E copies of each, and g experts in a row are a group of
    all shards, whose rows of the gate are equal: the g K best experts of a token are K whole groups. Outputs are scaled
    by g, for the gates of a group share what one copy would have. The paper scales both matrices, with the same
    product; this scales the last one, whatever the activation.

    Raises:
        ValueError: ``granularity`` is 1, or the router has no linear gate.
    """

    name = "granular"
    divides = True

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        if moe.granularity == 1:
            raise ValueError("start='granular' needs granularity above 1, into which the network is cut")
        return super().config(moe, part).split(part.dim)

    def total_gate(self, part: FeedForwardPart, layer: MoE) -> float:
        return part.hidden_dim / layer.experts.weights_of(0)["w_out"].shape[0]

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        gate, g = _linear_gate(layer, self.name), round(self.total_gate(part, layer))
        shards_gN = torch.arange(part.hidden_dim).view(g, -1)
        for e in range(layer.num_experts):
            copy_weights(layer.experts, e, _units_of(part, shards_gN[e % g], 1 / g))
        for rows in (gate.weight, gate.bias):
            if rows is not None:
                rows.copy_(rows[::g].repeat_interleave(g, 0))


@dataclass(frozen=True)
class SplitStart(Start):
    """The hidden units are split among the experts (MoEfication, arXiv 2110.01786; LLaMA-MoE, arXiv 2406.16554).

    An expert has an E-th of the units, and the network is the sum of all experts. With ``top_k=E`` and gates of 1
    (``TokenChoice(E, normalize="unit")``) the layer is the network; with fewer experts per token it comes close if few
    units respond to a token, as with ReLU. ``b_out`` counts once for a token.

    With ``shared`` every expert also has the network's most important units (MoEBERT, arXiv 2204.07675), which count
    once for a token too: their outputs are scaled by 1 over its number of experts. MoEBERT keeps the width of an expert
    and drops the least important units; here no unit is lost, and an expert is ``shared + (F - shared) / E`` wide.

    Attributes:
        by: how the units are grouped: "clusters" of like columns of ``w_in`` (``w_gate`` if gated); "coactivation",
            clusters of units that answer the same tokens of ``sparsify(inputs=...)``; "importance", dealt one by one
            from the most important one down, by ``sparsify(importances=...)``; "random".
        shared: number of the most important units that every expert has, with ``by="importance"``.

    But for "random" a row of a linear gate starts as the mean of its expert's own columns (arXiv 2310.10908), so that a
    token prefers experts that answer it.

    Raises:
        ValueError: ``by`` is another word, ``shared`` is negative, or set when nothing ranks the units.
    """

    name = "split"
    even_gates = True

    by: Literal["clusters", "coactivation", "importance", "random"] = "clusters"
    shared: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared and self.by != "importance":
            raise ValueError(f"shared={self.shared} is the number of the most important units: by='importance' alone")

    @property
    def reads(self) -> str:
        return {"coactivation": "inputs", "importance": "importances"}.get(self.by, "")

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        config, E, own = super().config(moe, part), moe.num_experts, part.hidden_dim - self.shared
        if own < E or own % E:
            less = f" less shared={self.shared}" if self.shared else ""
            raise ValueError(f"num_experts={E} does not divide the network's {part.hidden_dim} hidden units{less}")
        return replace(config, expert=widened(part.expert, self.shared + own // E))

    def total_gate(self, part: FeedForwardPart, layer: MoE) -> float:
        return layer.pairs_per_token

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        E = layer.num_experts
        if any(t.is_meta for t in part.weights.values()):
            return
        shared_N = torch.empty(0, dtype=torch.long)
        if self.by == "random":
            units_EN = random_groups(part.hidden_dim, E, generator)
        elif self.by == "importance":
            assert known is not None
            shared_N, own_N = known.argsort(descending=True, stable=True).tensor_split([self.shared])
            units_EN = own_N.view(-1, E).t()
        else:
            features = keys_of(part) if known is None else activity_of(part, known)
            units_EN = balanced_clusters(features, E, generator)
        share = 1 / layer.pairs_per_token
        for e, unit_N in enumerate(units_EN):
            weights = _units_of(part, torch.cat((shared_N, unit_N)), share)
            weights["w_out"][: len(shared_N)] *= share
            copy_weights(layer.experts, e, weights)
        gate = getattr(layer.router, "gate", None)
        if self.by != "random" and isinstance(gate, LinearGate):
            gate.weight.copy_(keys_of(part)[units_EN].mean(1))


def _units_of(part: FeedForwardPart, unit_N: Tensor, share: float) -> dict[str, Tensor]:
    """Return the tensors of an expert with these hidden units, and with this share of ``b_out``."""
    weights: dict[str, Tensor] = {}
    for name, tensor in part.weights.items():
        if name == "b_out":
            weights[name] = tensor * share
        else:
            weights[name] = tensor.index_select(0 if name == "w_out" else -1, unit_N.to(tensor.device))
    return weights


def _linear_gate(layer: MoE, start: str) -> LinearGate:
    gate = getattr(layer.router, "gate", None)
    if not isinstance(gate, LinearGate) or gate.weight.shape[0] != layer.num_experts:
        raise ValueError(
            f"start={start!r} needs a router with a linear gate, and {type(layer.router).__name__} has none"
        )
    return gate


@dataclass(frozen=True)
class RandomStart(Start):
    """Experts are initialized as in a new layer; their kind may be any."""

    name = "random"
    keeps_output = False
    divides = True

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        return replace(moe, expert=part.expert) if moe.expert == FFN() else moe

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator, known: Tensor | None) -> None:
        pass


STARTS: dict[str, Start] = {
    start.name: start for start in (CopyStart(), GranularStart(), DropStart(), SplitStart(), RandomStart())
}
"""The starts with their default options, by name."""


def start_of(start: str | Start) -> Start:
    """Return the start of a name, or a start as it is.

    Raises:
        ValueError: no start has this name.
    """
    if isinstance(start, Start):
        return start
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not one of {', '.join(STARTS)}")
    return STARTS[start]


def outputs_of(weights: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors of an expert in which its output is linear: the tensors of the last matmul."""
    return [weights[name] for name in ("w_out", "b_out") if name in weights]
