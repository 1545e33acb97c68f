"""``RoutingStats``: the use of the experts that a tape recorded, as arrays. Plots belong to the apps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .contract import Entry, Loads, Routing, Tape, device_of_ranks, several_ranks, sum_over_ranks

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each sum of a layer."""
MODALITIES = 8
"""Modalities that are told apart; tokens of higher numbers are in no figure of a modality."""
PERCENTILES = (5, 25, 50, 75, 95)
"""Percentiles of the experts' load that a detailed log has."""


@dataclass(frozen=True)
class LayerStats:
    """Sums over the recorded non-padding tokens of one layer; the figures are properties.

    Attributes:
        tokens_per_expert: int64 (E,), pairs that each expert computed.
        chosen_per_expert: int64 (E,), pairs that chose each expert, before capacity.
        entropy_sum: sum over tokens of the entropy of their scores, in nats.
        num_tokens: number of non-padding tokens.
        gates_per_expert: float (E,), sum of each expert's combine weights; None if they are not known.
        shared_gate_sum: sum over tokens of the gate between the routed path and the shared experts, without dropout;
            None: the layer has no such gate.
        pairs_of_modality: int64 (G, E), pairs that each expert computed of the tokens of each modality in
            ``context.modality_BS``; None: the modalities are not known.
        tokens_of_modality: int64 (G,), number of non-padding tokens of each modality; None as above.

    A dense gate (``DenseRouting``) gives all examples to all experts: there the two counts are float sums of its gates.
    """

    tokens_per_expert: Tensor
    chosen_per_expert: Tensor
    entropy_sum: Tensor
    num_tokens: Tensor
    gates_per_expert: Tensor | None = None
    shared_gate_sum: Tensor | None = None
    pairs_of_modality: Tensor | None = None
    tokens_of_modality: Tensor | None = None

    @property
    def mean_gates(self) -> Tensor:
        """The mean combine weight of each expert over the non-padding tokens, float64 (E,).

        Raises:
            ValueError: the gates are not known.
        """
        if self.gates_per_expert is None:
            raise ValueError("the gates of this layer were not recorded")
        return self.gates_per_expert.double() / self.num_tokens.clamp_min(1)

    @property
    def load_imbalance(self) -> float:
        """Most loaded expert over the mean, 1 at balance, E when one expert takes all; by choice, before capacity."""
        return float(self.relative_load.max())

    @property
    def max_violation(self) -> float:
        """MaxVio (arXiv 2408.15664): the load above the mean of the most loaded expert, over the mean; 0 at balance."""
        return self.load_imbalance - 1

    @property
    def load_variation(self) -> float:
        """Coefficient of variation of the load: its standard deviation over the experts, over its mean."""
        return float(self.relative_load.std(correction=0))

    @property
    def relative_load(self) -> Tensor:
        """Load of each expert over the mean, float64 (E,), by choice, before capacity; ones without tokens."""
        chosen = self.chosen_per_expert.double()
        return chosen / chosen.mean() if chosen.sum() > 0 else torch.ones_like(chosen)

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's scores over log E: 0 certain, 1 undecided."""
        E = len(self.chosen_per_expert)
        if E == 1 or self.num_tokens == 0:
            return 0.0
        return float(self.entropy_sum / self.num_tokens / torch.tensor(float(E)).log())

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over log E: 1 at balance, 0 when one expert takes all."""
        share = self.chosen_per_expert.double() / self.chosen_per_expert.sum().clamp_min(1)
        E = len(share)
        return float(torch.special.entr(share).sum() / torch.tensor(float(E)).log()) if E > 1 else 1.0

    @property
    def drop_rate(self) -> float:
        """Share of chosen pairs of non-padding tokens that no expert had room for."""
        chosen = int(self.chosen_per_expert.sum())
        return 1 - int(self.tokens_per_expert.sum()) / chosen if chosen else 0.0

    @property
    def dead_experts(self) -> int:
        """Experts that no token chose; of a dense gate the experts with less than 1 % of an equal share."""
        chosen = self.chosen_per_expert
        if chosen.is_floating_point():
            return int((chosen * len(chosen) < 0.01 * chosen.sum()).sum())
        return int((chosen == 0).sum())

    @property
    def shared_gate(self) -> float:
        """Mean of the gate between the routed path and the shared experts: with ``MoEConfig.shared_gate="mix"`` the
        share of the routed path, with "scale" the weight of the shared experts; 0 without tokens.

        Raises:
            ValueError: the layer has no such gate.
        """
        if self.shared_gate_sum is None:
            raise ValueError("this layer has no gate on its shared experts")
        return float(self.shared_gate_sum / self.num_tokens.clamp_min(1))

    def modality_figures(self) -> dict[str, float]:
        """Return the figures of the modalities that have tokens, for the modality 1 by the names ``modality1_experts``:
        experts in use, ``exp`` of the entropy of its computed pairs, and ``modality1_unreached``: experts that computed
        no token of it. Empty where the modalities are not known.
        """
        if self.pairs_of_modality is None or self.tokens_of_modality is None:
            return {}
        figures: dict[str, float] = {}
        for g, tokens in enumerate(self.tokens_of_modality.tolist()):
            if tokens:
                pairs_E = self.pairs_of_modality[g]
                share_E = pairs_E.double() / pairs_E.sum().clamp_min(1)
                used = torch.special.entr(share_E).sum().exp() * (pairs_E.sum() > 0)
                figures[f"modality{g}_experts"] = float(used)
                figures[f"modality{g}_unreached"] = float((pairs_E == 0).sum())
        return figures

    def figures(self, detailed: bool = False) -> dict[str, float]:
        """Return the scalars by name, for a log; ``shared_gate`` if there is one, and ``modality_figures``.

        Args:
            detailed: with ``max_violation``, ``load_variation`` and percentiles of the experts' load over the mean.
        """
        names = ["load_imbalance", "entropy", "load_entropy", "drop_rate", "dead_experts"]
        if self.shared_gate_sum is not None:
            names.append("shared_gate")
        if not detailed:
            return {name: float(getattr(self, name)) for name in names} | self.modality_figures()
        figures = {name: float(getattr(self, name)) for name in (*names, "max_violation", "load_variation")}
        figures |= self.modality_figures()
        at = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64, device=self.chosen_per_expert.device)
        loads = self.relative_load.quantile(at).tolist()
        return figures | {f"load_p{p}": load for p, load in zip(PERCENTILES, loads, strict=True)}

    def layout(self) -> Layout:
        """Return shape and dtype of each sum that is known."""
        return {key: (tuple(t.shape), t.dtype) for key, t in vars(self).items() if t is not None}

    def __add__(self, other: LayerStats) -> LayerStats:
        own, others = vars(self), vars(other)  # a sum that one of both lacks is not known
        both = [name for name, value in own.items() if value is not None and others[name] is not None]
        return LayerStats(**{name: own[name] + others[name] for name in both})


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of the experts' use by layer. They add up over batches, and read any tape, in training or evaluation.

    Attributes:
        layers: ``LayerStats`` by layer name, in the order of the passes.
    """

    layers: dict[str, LayerStats]

    @classmethod
    def from_tape(cls, tape: Tape) -> RoutingStats:
        """Return the statistics of all passes on the tape; the host waits for a device when a figure is read."""
        return sum((cls({entry.name: _layer_stats(entry)}) for entry in tape.entries), cls({}))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RoutingStats:
        """Return the sums over all ranks, on every rank; itself where there is one rank. Every rank has to call it, as
        after a pass over its share of the data. A layer that a rank has no passes of adds nothing there.

        Args:
            group: the ranks, which have the same layers and other tokens; None: all.

        Raises:
            ValueError: a layer has other sums on another rank.
        """
        if not several_ranks(group):
            return self
        of_ranks: list[dict[str, Layout]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(of_ranks, {name: stats.layout() for name, stats in self.layers.items()}, group=group)
        layouts = {name: layout for of_rank in of_ranks for name, layout in of_rank.items()}
        for of_rank in of_ranks:
            for name, layout in of_rank.items():
                if layout != layouts[name]:
                    raise ValueError(f"layer {name!r} has sums {layout} on one rank and {layouts[name]} on another")
        if not layouts:
            return self
        device = next((stats.tokens_per_expert.device for stats in self.layers.values()), None)
        device = device or device_of_ranks(group)
        # Float64 holds any count of pairs.
        own = [
            getattr(self.layers[name], key).to(torch.float64)
            if name in self.layers
            else torch.zeros(shape, dtype=torch.float64, device=device)
            for name, layout in layouts.items()
            for key, (shape, _) in layout.items()
        ]
        added = iter(sum_over_ranks(own, group))
        return RoutingStats(
            {
                name: LayerStats(**{key: next(added).to(dtype) for key, (_, dtype) in layout.items()})
                for name, layout in layouts.items()
            }
        )

    def __add__(self, other: RoutingStats) -> RoutingStats:
        merged = dict(self.layers)
        for name, stats in other.layers.items():
            merged[name] = merged[name] + stats if name in merged else stats
        return RoutingStats(merged)


@torch.no_grad()
def _layer_stats(entry: Entry) -> LayerStats:
    routing = entry.routing
    if isinstance(routing, Loads):
        raise ValueError(f"layer {entry.name!r} is on this tape with its loads alone: statistics are taken before them")
    valid_T = routing.valid_T
    device = routing.chosen_per_expert_E.device
    num_tokens = torch.full((), routing.num_tokens, device=device) if valid_T is None else valid_T.sum()
    entropy_sum = torch.zeros((), device=device)
    scores_TE = routing.evidence.scores_TE
    if scores_TE is not None:
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        entropy_T = torch.special.entr(scores_TE).sum(-1)
        entropy_sum = (entropy_T if valid_T is None else entropy_T * valid_T).sum()
    gate_T = entry.shared_gate_T
    return LayerStats(
        routing.tokens_per_expert_E,
        routing.chosen_per_expert_E,
        entropy_sum,
        num_tokens,
        _gates_per_expert(routing),
        None if gate_T is None else (gate_T if valid_T is None else gate_T * valid_T).sum(),
        *_by_modality(entry),
    )


def _by_modality(entry: Entry) -> tuple[Tensor | None, Tensor | None]:
    """Return the computed pairs by modality and expert, and the non-padding tokens by modality; None if not known."""
    routing, context = entry.routing, entry.context
    if context is None or context.modality_BS is None or not isinstance(routing, Routing):
        return None, None
    modality_T = context.modality_BS.flatten()
    if len(modality_T) != routing.num_tokens:  # the router saw other tokens than the layer, such as whole patches
        return None, None
    # Beyond the known ones there is a further modality, and the expert E of pairs that are not computed: both cut off.
    modality_T = torch.where((modality_T >= 0) & (modality_T < MODALITIES), modality_T, MODALITIES)
    columns = len(routing.tokens_per_expert_E) + 1
    cells_N = modality_T[routing.token_index_N] * columns + routing.expert_ids_N
    pairs = torch.zeros((MODALITIES + 1) * columns, dtype=torch.int64, device=cells_N.device)
    pairs.index_add_(0, cells_N, torch.ones_like(cells_N))
    real_T = torch.ones_like(modality_T) if routing.valid_T is None else routing.valid_T.to(torch.int64)
    tokens = torch.zeros(MODALITIES + 1, dtype=torch.int64, device=cells_N.device).index_add_(0, modality_T, real_T)
    return pairs.unflatten(0, (-1, columns))[:-1, :-1], tokens[:-1]


def _gates_per_expert(routing: Any) -> Tensor | None:
    if isinstance(routing, Routing):
        total_E = routing.gates_N.new_zeros(routing.tokens_per_expert_E.shape[0] + 1)
        # Pairs that are not computed have the id E.
        return total_E.index_add(0, routing.expert_ids_N, routing.gates_N)[:-1]
    scores_TE = routing.evidence.scores_TE
    if scores_TE is None:
        return None
    return (scores_TE if routing.valid_T is None else scores_TE * routing.valid_T[:, None]).sum(0)
