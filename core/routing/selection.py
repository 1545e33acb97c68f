"""Pure functions that turn a gate's choice into a ``Routing``: its pairs, and which of them fit the experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast

import torch
from torch import Tensor

from ..contract import Evidence, Routing
from ..fields import Bounds, Checked, Count, OneOf
from ..kernels import queue_ranks
from ..kernels.eager import capacity, count_experts, whole_ratio

PRIORITIES = ("position", "score", "random")
Priority = Annotated[str, OneOf(*PRIORITIES)]
Group = Annotated[str, OneOf("batch", "sequence")] | Count
Factor = Annotated[float, Bounds(0, ends="()", why="None means dropless")]
EvalFactor = Annotated[float, Bounds(0, ends="(]")]  # infinity means dropless


@dataclass(frozen=True)
class Capacity(Checked):
    """The limits of the experts' loads, and the order in which tokens are served.

    Attributes:
        factor: each expert of a group takes ``ceil(factor * K * tokens in group / E)`` pairs in training; None: all.
        eval_factor: factor in evaluation; None: the factor of training; infinity: each expert takes all pairs.
        priority: "position": first choices before second ones, then the earlier token (GShard, arXiv 2006.16668);
            "score": first choices before second ones, then the token with the highest score (batch-prioritized routing,
            arXiv 2106.05974, algorithm 2); "random": a random order of the tokens, in training only.
        group: tokens that compete: "batch", "sequence", or a number of neighboring tokens.

    Raises:
        ValueError: a factor is not positive, the priority is unknown, or the group is neither.
    """

    factor: Factor | None = None
    eval_factor: EvalFactor | None = None
    priority: Priority = "position"
    group: Group = "batch"
    # The factors as integers: under ``torch.compile(dynamic=True)`` a float cannot be read digit by digit.
    _ratio: tuple[int, int] | None = field(init=False, repr=False, compare=False, default=None)
    _eval_ratio: tuple[int, int] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_ratio", None if self.factor is None else whole_ratio(self.factor))
        eval_factor = self.factor if self.eval_factor is None else self.eval_factor
        eval_factor = None if eval_factor == float("inf") else eval_factor
        object.__setattr__(self, "_eval_ratio", None if eval_factor is None else whole_ratio(eval_factor))

    def ratio(self, training: bool) -> tuple[int, int] | None:
        """Return the factor of training or evaluation as a ratio of integers."""
        return self._ratio if training else self._eval_ratio


def group_tokens(group: str | int, num_sequences: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the group of each token, int64 (T,), and how many groups there are; the last may be shorter."""
    T = num_sequences * length
    if group == "batch":
        return torch.zeros(T, dtype=torch.int64, device=device), 1
    size = length if group == "sequence" else int(group)
    size = max(size, 1)
    return torch.arange(T, device=device) // size, -(-T // size)


def served_tokens(priority: str, score_T: Tensor, training: bool) -> Tensor | None:
    """Return the tokens in the order in which they are served, int64 (T,); None if they are served as they come."""
    if priority == "score":
        return score_T.argsort(descending=True, stable=True)
    if priority == "random" and training:
        # shape[0]: len() would fix the number of tokens under torch.export
        return torch.randperm(score_T.shape[0], device=score_T.device)
    return None


@dataclass(frozen=True)
class Choice:
    """A gate's decision for each token, before padding and capacity.

    Attributes:
        expert_ids_TK: int64 (T, K), the best expert first; E if a token leaves a place empty.
        gates_TK: float32 (T, K), combine weights; gates of empty places are not read.
        evidence: logits, scores and the like for the losses and the statistics; None: the gate has none.
        priority_T: float32 (T,), the higher is served first under priority "score"; None: the largest score.
        chosen_per_expert_E: int64 (E,), non-padding tokens that chose each expert, if a kernel counted them on the way.
        kept_sum: number that the gates of a token's computed pairs are brought to sum to; None: they are left as they
            are.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor
    evidence: Evidence | None = None
    priority_T: Tensor | None = None
    chosen_per_expert_E: Tensor | None = None
    kept_sum: float | None = None


def select_pairs(
    choice: Choice,
    *,
    num_experts: int,
    num_sequences: int,
    valid_T: Tensor | None,
    limit: Capacity,
    training: bool,
    backend: str = "auto",
) -> Routing:
    """Flatten each token's choices to pairs and mark the pairs that are not computed.

    Args:
        choice: experts and gates of T tokens.
        num_experts: E.
        num_sequences: B, for groups by sequence.
        valid_T: bool (T,), False for padding.
        limit: capacity, priority and groups.
        training: whether the capacity factor of training applies, and random priority is random.
        backend: name of the kernels that count the places in the experts' queues.

    Raises:
        ValueError: on CPU, a choice is neither an expert nor E.
    """
    expert_ids_TK = choice.expert_ids_TK
    (T, K), E, device = expert_ids_TK.shape, num_experts, expert_ids_TK.device
    if valid_T is not None:
        expert_ids_TK = expert_ids_TK.masked_fill(~valid_T[:, None], E)
    expert_ids_N = expert_ids_TK.flatten()
    chosen_E = choice.chosen_per_expert_E
    if chosen_E is None:
        chosen_E = _count(expert_ids_N, E)
    tokens_E, most = chosen_E, None
    ratio = limit.ratio(training)
    # Where K * factor >= E an expert could take every token, so nothing can be dropped.
    if ratio is not None and K * ratio[0] < E * ratio[1]:
        group_T, num_groups = group_tokens(limit.group, num_sequences, T // max(num_sequences, 1), device)
        real_T = torch.ones_like(group_T) if valid_T is None else valid_T.to(torch.int64)
        size_G = torch.zeros(num_groups, dtype=torch.int64, device=device).scatter_add_(0, group_T, real_T)
        capacity_G = torch.as_tensor(capacity(ratio, K, size_G, E))
        length = T // max(num_sequences, 1)
        size = T if limit.group == "batch" else length if limit.group == "sequence" else int(limit.group)
        most = cast(int, num_groups * capacity(ratio, K, size, E))
        queue_TK = torch.where(expert_ids_TK < E, group_T[:, None] * E + expert_ids_TK, num_groups * E)
        served_T = served_tokens(limit.priority, _priority(choice), training)
        rank_TK = queue_ranks(queue_TK, served_T, num_groups * E + 1, backend=backend)
        full_TK = rank_TK >= capacity_G[group_T][:, None]
        expert_ids_N = expert_ids_TK.masked_fill(full_TK, E).flatten()
        tokens_E = count_experts(expert_ids_N, E)
    gates_N = choice.gates_TK.flatten().masked_fill(expert_ids_N == E, 0.0)
    if choice.kept_sum is not None:
        gates_TK = gates_N.view(T, K)
        gates_N = (choice.kept_sum * gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(1e-20)).flatten()
    return Routing(
        token_index_N=torch.arange(T * K, device=device) // K,
        expert_ids_N=expert_ids_N,
        gates_N=gates_N,
        tokens_per_expert_E=tokens_E,
        chosen_per_expert_E=chosen_E,
        num_tokens=T,
        top_k=K,
        valid_T=valid_T,
        num_sequences=num_sequences,
        most_per_expert=most,
        evidence=Evidence() if choice.evidence is None else choice.evidence,
    )


def _count(expert_ids_N: Tensor, num_experts: int) -> Tensor:
    """Return ``count_experts``, and where it fails name the expert that a gate chose and that is not there."""
    if torch.compiler.is_compiling():
        return count_experts(expert_ids_N, num_experts)
    try:
        return count_experts(expert_ids_N, num_experts)
    except (IndexError, RuntimeError):
        low, high = (int(extreme) for extreme in expert_ids_N.aminmax())
        if low >= 0 and high <= num_experts:
            raise
        raise ValueError(
            f"a gate chose expert {low if low < 0 else high}, which is not in range({num_experts}) "
            f"or {num_experts} for an empty place"
        ) from None


def _priority(choice: Choice) -> Tensor:
    if choice.priority_T is not None:
        return choice.priority_T.detach()
    scores_TE = None if choice.evidence is None else choice.evidence.scores_TE
    return (choice.gates_TK if scores_TE is None else scores_TE).detach().amax(-1)
