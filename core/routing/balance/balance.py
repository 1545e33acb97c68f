"""Options of the balance losses, and the small steps that a weight and the selection bias make after the loads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...fields import Bounds, Checked, Count, CountOrZero, NotNegative, Positive, Share, ShareBelowOne
from ...registry import register_config


@dataclass(frozen=True)
class BalanceWeights(Checked):
    """Weights of the balance losses. A term that does not apply to the router is skipped while it is at its default,
    and raises an error when set by hand.

    Attributes:
        load_balancing_loss: ``E * sum_e f_e P_e`` (Switch, arXiv 2101.03961, eq. 4); 1 at balance.
        router_z_loss: mean of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).
        importance: squared coefficient of variation of the experts' summed scores, over all experts, not the gates of
            the chosen ones (V-MoE, arXiv 2106.05974, section A.1, and its code).
        load: squared coefficient of variation of the experts' smooth load, which needs noise on the logits
            (arXiv 1701.06538, eq. 11).
        mutual_information: minus the mutual information of token and expert (ModuleFormer, arXiv 2306.04640), or, with
            ``num_tasks``, of task and expert (Mod-Squad, arXiv 2212.08066); in nats.
        local_entropy: mean entropy of a token's scores, summed over modalities (LIMoE, arXiv 2206.02770); in nats.
        global_entropy: ``max(0, entropy_threshold - entropy of the mean scores)``, summed over modalities (LIMoE).
        sequence_balance: mean over sequences of ``load_balancing_loss`` within each; the choice is the top-k of the
            scores without bias or noise (DeepSeek-V3, arXiv 2412.19437, eq. 17-20, which sets the weight to 1e-4).
        localized: variance over mean of the importance of each expert in each sequence, ``Z = (1 + delta) Q`` if the
            expert has the sequence's type and ``(1 - delta) Q`` elsewhere, with Q the sum of its scores over the
            sequence; the type is ``context.task_ids_B`` (LoRAMoE, arXiv 2312.09979).
        first_choice: ``load_balancing_loss`` with only the shares of first choices, the best by the scores without bias
            or noise, instead of all K (GShard, arXiv 2006.16668, algorithm 1).
        gate_importance: squared coefficient of variation of the experts' summed gates, which are 0 for experts that a
            token did not take, or that were full (arXiv 1701.06538, eq. 6-7).
        contrast: mean of ``contrast_losses`` over rows of the pass, in training (MoELoRA, arXiv 2402.12851); in nats.
        gate_budget: mean of ``|g - budget|``, g being the share of the routed path that ``MoEConfig.shared_gate="mix"``
            gives a token (NLLB, arXiv 2207.04672).
    """

    load_balancing_loss: NotNegative = 0.01
    router_z_loss: NotNegative = 0.001
    importance: NotNegative = 0.0
    load: NotNegative = 0.0
    mutual_information: NotNegative = 0.0
    local_entropy: NotNegative = 0.0
    global_entropy: NotNegative = 0.0
    localized: NotNegative = 0.0
    sequence_balance: NotNegative = 0.0
    first_choice: NotNegative = 0.0
    gate_importance: NotNegative = 0.0
    contrast: NotNegative = 0.0
    gate_budget: NotNegative = 0.0

    def weights(self) -> dict[str, float]:
        """Return the weight of each term."""
        return {f.name: getattr(self, f.name) for f in fields(BalanceWeights)}


@register_config
@dataclass(frozen=True)
class Balance(BalanceWeights):
    """Weights and options of the balance losses of a layer.

    Attributes:
        num_tasks: number of tasks in ``context.task_ids_B`` for ``mutual_information``; 0: it belongs to tokens.
        num_modalities: number of modalities in ``context.modality_BS`` for the entropies; 1: all tokens belong to one.
        local_entropy_modality: the only modality whose local entropy counts (LIMoE: text); None: all.
        entropy_threshold: entropy in nats, for all modalities or one for each (LIMoE); ``log(n)`` asks for about n
            experts a modality; None: ``log(E)``.
        budget: share of the routed path that ``gate_budget`` asks for, in [0, 1].
        localized_delta: delta of ``localized``, in (-1, 1). The loss is 0 where experts of a sequence's type have
            ``(1 - delta) / (1 + delta)`` times the importance of the others: by a negative delta they have more.
        contrast_temperature: temperature of ``contrast``.
        contrast_rows: most rows of a pass that ``contrast`` compares; the same number is computed twice.
        expert_types: type of each expert, for ``localized``; types are the tasks, from 0 on.
        scope: "global": a term is a function of the tokens of all ranks; "rank": of each rank's own, with the mean of
            the ranks as its gradient (as Switch and most others do; cheaper, and stricter if a rank has few tokens).
        adaptive: whether the layer's weight of ``load_balancing_loss``, which starts at that field, follows the drop
            rate: ``update_expert_bias`` moves it once per optimizer step by ``adaptive_weight`` (Skywork-MoE, arXiv
            2406.06563). This needs a capacity factor.
        adaptive_scale, adaptive_max, adaptive_momentum: weight per drop rate, largest weight, and momentum.

    V-MoE's loss is ``Balance(load_balancing_loss=0, router_z_loss=0, importance=0.005, load=0.005)``; LIMoE adds
    ``local_entropy`` and ``global_entropy`` with ``num_modalities=2`` to it. ``Balance(adaptive=True)`` is Skywork's.

    Raises:
        ValueError: a weight is negative or not finite, or another value is out of its range.
    """

    prefix = "balance."

    num_tasks: CountOrZero = 0
    num_modalities: Count = 1
    local_entropy_modality: CountOrZero | None = None
    entropy_threshold: Positive | tuple[Positive, ...] | None = None
    budget: Share = 0.8
    localized_delta: Annotated[float, Bounds(-1, 1, "()")] = 0.1
    expert_types: tuple[CountOrZero, ...] = ()
    contrast_temperature: Positive = 0.1
    contrast_rows: Count = 256
    scope: Literal["global", "rank"] = "global"
    adaptive: bool = False
    adaptive_scale: Positive = 0.2
    adaptive_max: Positive = 0.01
    adaptive_momentum: ShareBelowOne = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        only, thresholds = self.local_entropy_modality, self.entropy_threshold
        if only is not None and only >= self.num_modalities:
            raise ValueError(f"balance.local_entropy_modality={only} is not below num_modalities={self.num_modalities}")
        if isinstance(thresholds, tuple) and len(thresholds) != self.num_modalities:
            raise ValueError(
                f"balance.entropy_threshold={thresholds} has {len(thresholds)} numbers for "
                f"num_modalities={self.num_modalities}"
            )
        if self.localized and not self.expert_types:
            raise ValueError(f"balance.localized={self.localized} needs expert_types, the type of each expert")
        if self.adaptive and self.load_balancing_loss == 0:
            raise ValueError("balance.adaptive=True moves load_balancing_loss, which is 0: its term would be left out")

    @property
    def num_types(self) -> int:
        """Return the number of types that ``expert_types`` names: they are in ``range(num_types)``."""
        return max(self.expert_types, default=-1) + 1

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the fields of ``RoutingContext`` that the terms of positive weight read."""
        reads = {
            "task_ids_B": self.localized or (self.mutual_information and self.num_tasks),
            "modality_BS": (self.local_entropy or self.global_entropy) and self.num_modalities > 1,
        }
        return tuple(name for name, is_read in reads.items() if is_read)

    def check(self, terms: frozenset[str], router: str, num_experts: int | None = None) -> None:
        """Raise a ``ValueError`` for a term that was set by hand and does not apply to the router.

        Args:
            terms: names of the terms that apply.
            router: names the router in the message.
            num_experts: E; None: the layer's gates differ in their experts, whose types one list cannot name.
        """
        for f in fields(BalanceWeights):
            weight = getattr(self, f.name)
            if weight and weight != f.default and f.name not in terms:
                why = " without noise on its logits, or with a bias or group limits" if f.name == "load" else ""
                raise ValueError(f"balance.{f.name}={weight} does not apply to {router}{why}")
        if self.localized and num_experts is None:
            raise ValueError(
                f"balance.localized={self.localized} does not apply to {router}: it is for MoEConfig's layers"
            )
        if self.localized and len(self.expert_types) != num_experts:
            raise ValueError(f"balance.expert_types has {len(self.expert_types)} types for num_experts={num_experts}")
        if self.adaptive and "load_balancing_loss" not in terms:
            raise ValueError(f"balance.adaptive=True moves load_balancing_loss, which does not apply to {router}")


def adaptive_weight(weight: Tensor, drop_rate: Tensor, balance: Balance) -> Tensor:
    """Return the next weight of ``load_balancing_loss``, ``m * weight + (1 - m) * min(scale * drop_rate, max)``, with m
    the momentum (Skywork-MoE, arXiv 2406.06563, section 4.2; there scale 1/5, max 0.01, momentum 0.99)."""
    target = (balance.adaptive_scale * drop_rate).clamp_max(balance.adaptive_max)
    return balance.adaptive_momentum * weight + (1 - balance.adaptive_momentum) * target


def expert_bias_step(chosen_per_expert_E: Tensor, rate: float) -> Tensor:
    """Return ``rate * sign(mean load - load)``: an expert with too few tokens rises (arXiv 2408.15664, algorithm 1)."""
    load_E = chosen_per_expert_E.to(torch.float32)
    return rate * torch.sign(load_E.mean() - load_E)
