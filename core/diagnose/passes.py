"""``Pass``: one router's decisions in one pass, read from an entry of a tape or from a foreign router's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import DenseRouting, Entry, Loads, Routing
from ..layers import MoELayer
from ..routing.router import Router


@dataclass(frozen=True)
class Facts:
    """Properties of a router, other than its decisions.

    Attributes:
        layer: name of its layer.
        by_data: only the data decide (task, domain, token ids, chance), so that uneven loads are theirs.
        reads_position: a token's place decides by design.
        is_balanced: a loss or a bias acts on its loads.
        capacity: expected pairs of an expert that it has room for, as a factor, and the tokens that compete: "batch",
            "sequence" or a number; None: no limit.
    """

    layer: str = ""
    by_data: bool = False
    reads_position: bool = False
    is_balanced: bool = False
    capacity: tuple[float, str | int] | None = None


@dataclass(frozen=True)
class Pass:
    """One decision.

    Attributes:
        layer: name of the layer, with the router's end.
        num_experts: E.
        num_tokens: T, padding included.
        chosen_E, computed_E: pairs by expert before and after capacity; for dense gates the sums of the gates.
        kind: "pairs"; "gates": every expert for every token, weighted; "soft": slots and merged experts.
        facts: properties of the router.
        token_N, expert_N: int64 (N,), tokens and experts of the pairs, expert E if one is not computed; None but
            for "pairs".
        logits_TE: float32 (T, M), M at least E; -inf where a token cannot reach an expert. None: there are none.
        valid_T: bool (T,), False for padding that the router leaves out; None: it leaves nothing out.
        num_sequences: B, of T / B tokens each; None: not known.
        has_loss: whether a balance loss of the layer counts these tokens.
        modality_T: int64 (T,), the modality of each token; None: not known.
    """

    layer: str
    num_experts: int
    num_tokens: int
    chosen_E: Tensor
    computed_E: Tensor
    kind: str = "pairs"
    facts: Facts = Facts()
    token_N: Tensor | None = None
    expert_N: Tensor | None = None
    logits_TE: Tensor | None = None
    valid_T: Tensor | None = None
    num_sequences: int | None = None
    has_loss: bool = False
    modality_T: Tensor | None = None

    @property
    def num_real(self) -> int:
        """The number of tokens that the router counts as real."""
        return self.num_tokens if self.valid_T is None else int(self.valid_T.sum())

    def place_T(self) -> Tensor | None:
        """Return the place of each token in its sequence, int64 (T,); None without sequences."""
        B, T = self.num_sequences, self.num_tokens
        if not B or T % B or T // B < 2:
            return None
        return torch.arange(T, device=self.chosen_E.device) % (T // B)

    def chance_drops(self) -> float:
        """Return the pairs that would be dropped if tokens chose at random among all experts, evenly.

        The load of an expert is then binomial; its part above the capacity follows the normal distribution. A capacity
        of less than an even load is a choice and no chance: it counts as an even load.
        """
        if self.facts.capacity is None or self.kind != "pairs":
            return 0.0
        factor, group = self.facts.capacity
        B, pairs = self.num_sequences or 1, float(self.chosen_E.sum())
        groups = B if group == "sequence" else 1 if group == "batch" else max(self.num_real / int(group), 1.0)
        mean = pairs / groups / self.num_experts
        if mean <= 0:
            return 0.0
        deviation = math.sqrt(mean * (1 - 1 / self.num_experts))
        room = max(math.ceil(max(factor, 1.0) * mean), 1)
        if deviation == 0:
            return 0.0
        z = (room - mean) / deviation
        tail = 0.5 * math.erfc(z / math.sqrt(2))
        over = deviation * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - z * tail)
        return over * groups * self.num_experts


def facts_of(name: str, layer: MoELayer, router: Router | None) -> Facts:
    """Return the properties of the router of a layer's entry."""
    config = getattr(router, "config", None)
    has_gate = any(True for _ in (layer.router if router is None else router).parameters())
    needs = tuple(getattr(router, "needs", ()))
    terms = layer.router.terms if router is None and hasattr(layer.router, "terms") else getattr(router, "terms", ())
    weights = {**layer.balance.weights(), **getattr(router, "extra_weights", {})}
    loads = ("load_balancing_loss", "importance", "load", "mutual_information", "global_entropy", "sequence_balance")
    is_balanced = any(weights.get(term, 0.0) > 0 for term in loads if term in terms)
    ratio = None if router is None else router.capacity.ratio(False)
    capacity = None if ratio is None or router is None else (ratio[0] / ratio[1], router.capacity.group)
    return Facts(
        layer=name,
        by_data=not has_gate or bool(needs),
        reads_position=bool(getattr(config, "reads_position", False)),
        is_balanced=is_balanced
        or (getattr(router, "expert_bias", None) is not None and getattr(router, "bias_update_rate", 1.0) > 0),
        capacity=capacity,
    )


def of_entry(entry: Entry, facts: Facts) -> Pass:
    """Return the pass that an entry of a tape records.

    Raises:
        ValueError: the tape has only the loads.
    """
    routing = entry.routing
    if isinstance(routing, Loads):
        raise ValueError(f"layer {entry.name!r} is on this tape with its loads alone: a diagnosis is made before them")
    is_pairs = isinstance(routing, Routing)
    weights = {**entry.balance.weights(), **entry.extra_weights}
    has_loss = any(isinstance(w, Tensor) or w > 0 for term, w in weights.items() if term in entry.terms)
    logits_TE = routing.logits_BtE if isinstance(routing, DenseRouting) else None
    if isinstance(routing, DenseRouting):
        logits_TE = None if logits_TE is None else logits_TE[:, routing.gate]
    else:
        logits_TE = routing.evidence.logits_TE
    return Pass(
        layer=entry.name,
        num_experts=routing.chosen_per_expert_E.shape[0],
        num_tokens=routing.num_tokens,
        chosen_E=routing.chosen_per_expert_E.detach(),
        computed_E=routing.tokens_per_expert_E.detach(),
        kind="pairs" if is_pairs else "gates" if isinstance(routing, DenseRouting) else "soft",
        facts=facts,
        token_N=routing.token_index_N if is_pairs else None,
        expert_N=routing.expert_ids_N if is_pairs else None,
        logits_TE=None if logits_TE is None else logits_TE.detach().float(),
        valid_T=routing.valid_T,
        num_sequences=routing.num_sequences,
        has_loss=has_loss,
        modality_T=_modality_of(entry, routing.num_tokens),
    )


def _modality_of(entry: Entry, num_tokens: int) -> Tensor | None:
    """Return the modality of each token that the router saw, int64 (T,); None if its tokens are others."""
    modality_BS = None if entry.context is None else entry.context.modality_BS
    return None if modality_BS is None or modality_BS.numel() != num_tokens else modality_BS.flatten()
