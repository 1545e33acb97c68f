"""``Evidence``: the logits, scores and thresholds of a gate's choice, for the balance losses and the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """The part of a decision that the balance losses and the statistics read, in addition to its counts.

    A gate makes it when it chooses, and it is passed on whole: ``Choice.evidence`` is ``Routing.evidence``. Dispatchers
    and experts never read it. A field that a gate leaves at None is unknown, and terms that need it are left out.

    Attributes:
        scores_TE: float32 (T, E), the score function of ``logits_TE``; each row sums to 1 in the balance losses.
        logits_TE: float32 (T, E), without noise; (T, M) with null experts; -inf where a token cannot reach an expert.
        noise_std: standard deviation of the noise added to the logits, a float or (T, E); None without noise.
        threshold_TE: float32, broadcastable to (T, E): value that a noisy logit had to reach to be chosen.
        extra: the gate's own losses by name, float32 (T,) each; padding may hold any finite value. Their means over
            the non-padding tokens join the balance losses with the weights of ``RouterConfig.extra_weights``.
        balance_scores, balance_chosen: float32 (T, M) and (M,), scores and counts that the ``load_balancing_loss`` and
            ``importance`` losses read instead of ``scores_TE`` and ``Routing.chosen_per_expert_E``, if they judge more
            than the E experts (null experts), or another choice than the computed one.
        sums: sums for the balance losses that were made elsewhere: over the non-padding tokens by a kernel, see
            ``kernels.eager.TopK``, or over rows by the layer, see ``MoE``.
        sparse_scores: float32 (T, E), not negative, scores that the loss ``sparsity`` of a router's own holds down.
        counts: float32 (n,), the pass's part of the numbers that ``Router.after_counts`` reads once per step; they are
            added up over passes and ranks, and stay on ``Tape.loads``.
    """

    scores_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    noise_std: float | Tensor | None = None
    threshold_TE: Tensor | None = None
    extra: Mapping[str, Tensor] | None = None
    balance_scores: Tensor | None = None
    balance_chosen: Tensor | None = None
    sums: Mapping[str, Tensor] | None = None
    sparse_scores: Tensor | None = None
    counts: Tensor | None = None


def detached(value: Any) -> Any:
    """Return ``value`` without its graph: a tensor, or a dataclass or mapping of them, to any depth."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(inner) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: detached(getattr(value, f.name)) for f in fields(value) if f.init})
    return value
