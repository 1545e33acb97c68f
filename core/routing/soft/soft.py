"""Soft routing: no token is sent anywhere. Tokens are averaged into slots, or experts into one expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract import MergeRouting, RoutingContext, SlotRouting, span
from ...fields import Count, Positive, ShareBelowOne
from ...kernels import topk_gate
from ...kernels.eager import check_devices, outside_autocast
from ..gates import LinearGate, read_scalar
from ..router import Router, RouterConfig
from ..selection import Capacity


def check_sequence_group(group: str | int, router: str) -> None:
    """Raise a ``ValueError`` for a group other than the sequence."""
    if group != "sequence":
        raise ValueError(f"group={group!r} would mix a sequence with its neighbors: {router} takes 'sequence' alone")


def by_sequence(x: Tensor, context: RoutingContext | None) -> tuple[Tensor, Tensor | None]:
    """Return the (B, S, D) tokens in float32 with padding cleared, and ``valid_BS``.

    ``Tokens`` would flatten them, and ``torch.export`` cannot unflatten a view at any length.
    """
    x_BSD = x if x.dtype == torch.float64 else x.float()
    valid_BS = None if context is None else context.valid_BS
    return x_BSD if valid_BS is None else x_BSD.masked_fill(~valid_BS[:, :, None], 0.0), valid_BS


class SlotRouter(Router):
    """The router of ``SoftSlots``: the shares of the tokens in the slots, and of the slots in the tokens.

    Parameters: ``phi`` (E, P, D), a direction a slot; ``scale`` (1,), which sharpens both softmaxes.
    """

    def __init__(self, dim: int, num_experts: int, config: SoftSlots, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config = num_experts, config
        self.phi = nn.Parameter(torch.empty(num_experts, config.slots_per_expert, dim))
        self.scale = nn.Parameter(torch.ones(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # The length does not matter: only the direction is read.
        nn.init.normal_(self.phi, std=1 / math.sqrt(self.phi.shape[-1]))
        nn.init.ones_(self.scale)
        super().reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        read_scalar(state_dict, f"{prefix}scale")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> SlotRouting:
        with outside_autocast(x.device):
            check_devices(x, type(self).__name__, self._parameters)
            x_BSD, valid_BS = by_sequence(x, context)
            (B, S, _), (E, P, _) = x_BSD.shape, self.phi.shape
            phi_ND = F.normalize(self.phi.to(x_BSD.dtype).flatten(0, 1), dim=-1) * self.scale.to(x_BSD.dtype)
            logits_BSN = F.linear(F.normalize(x_BSD, dim=-1), phi_ND)
            combine_BSN = logits_BSN.softmax(-1)
            if valid_BS is None:
                dispatch_BSN = logits_BSN.softmax(1)
                sequences = torch.full((), B if S else 0, dtype=torch.int64, device=x.device)
            else:
                padding_BS1 = ~valid_BS[:, :, None]
                lowest = torch.finfo(x_BSD.dtype).min  # not -inf: a sequence of only padding would be NaN
                dispatch_BSN = logits_BSN.masked_fill(padding_BS1, lowest).softmax(1).masked_fill(padding_BS1, 0.0)
                combine_BSN = combine_BSN.masked_fill(padding_BS1, 0.0)
                sequences = valid_BS.any(1).sum()
            computed_E = (sequences * P).repeat(E)
            return SlotRouting(
                dispatch_GSEP=dispatch_BSN.unflatten(-1, (E, P)),
                combine_GSEP=combine_BSN.unflatten(-1, (E, P)),
                tokens_per_expert_E=computed_E,
                num_tokens=B * S,
                valid_T=None if valid_BS is None else valid_BS.flatten(),
            )


@dataclass(frozen=True)
class SoftSlots(RouterConfig):
    """Soft MoE (arXiv 2308.00951): the experts compute slots instead of tokens.

    ``logits = scale * l2(x) . l2(phi)``; a slot is the mean of its sequence's tokens under the softmax of its logits
    over the tokens, and a token's output the mean of all slots' under the softmax of its logits over the slots. Fully
    differentiable and even by construction: no balance loss applies. An expert computes ``slots_per_expert`` rows per
    sequence, however long it is, so FLOPs per token depend on ``tokens_per_sequence``. Not for causal decoders.

    Attributes:
        slots_per_expert: P. A layer costs as much as a dense FFN where ``E * P`` is the length of the sequences.
    """

    paper = "2308.00951"
    router_class = SlotRouter
    layer_kind = "slots"
    layer_options = frozenset({"backend"})
    default_group = "sequence"
    is_causal = False

    slots_per_expert: Count = 1

    def check_group(self, group: str | int) -> None:
        check_sequence_group(group, "SoftSlots")

    def pairs_per_token(self, num_experts: int) -> float:
        # A token is in every slot, and every slot in it.
        return float(num_experts)

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        return num_experts * self.slots_per_expert / _known(tokens_per_group, "SoftSlots")

    def layer_flops_per_token(
        self, dim: int, out_dim: int, num_experts: int, params_per_expert: int, tokens_per_group: int | None
    ) -> float:
        # Tokens into slots, slots into tokens.
        return 2.0 * num_experts * self.slots_per_expert * (dim + out_dim)

    def num_params(self, dim: int, num_experts: int) -> int:
        return num_experts * self.slots_per_expert * dim + 1

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * dim * num_experts * self.slots_per_expert


def _known(tokens_per_group: int | None, router: str) -> int:
    if tokens_per_group is None:
        raise ValueError(f"FLOPs per token of {router} depend on the length of the sequences: give tokens_per_sequence")
    return tokens_per_group


def in_segments(x: Tensor, count: int, length: int) -> Tensor:
    """Cut (B, S, ...) into segments, (B, count, length, ...); copies of the last token fill up the last one."""
    # An index serves any length; ``torch.export`` would fix padding to one.
    index = torch.arange(count * length, device=x.device).clamp_max(x.shape[1] - 1)
    return x.index_select(1, index).unflatten(1, (count, length))


class MergeRouter(Router):
    """The router of ``Merge``: the weights of the experts' parameters for each sequence or segment."""

    def __init__(self, dim: int, num_experts: int, config: Merge, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config = num_experts, config
        self.gate = LinearGate(dim, num_experts, config.init_scale)

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MergeRouting:
        config = self.config
        with outside_autocast(x.device):
            x_BSD, valid_BS = by_sequence(x, context)
            B, S, _ = x_BSD.shape
            J, L = config.segments(S)
            real_BS = x_BSD.new_ones(B, S) if valid_BS is None else valid_BS.to(x_BSD.dtype)
            if config.kind == "lory":
                real_BJL, x_BJLD = in_segments(real_BS, J, L), in_segments(x_BSD, J, L)
                # The copies that fill up the last segment count no more than padding.
                real_BJL = real_BJL * (torch.arange(J * L, device=x.device) < S).reshape(J, L)
                count_BJ = real_BJL.sum(2)
                mean_BJD = (x_BJLD * real_BJL[..., None]).sum(2) / count_BJ.clamp_min(1)[..., None]
                logits_BJE = self.gate(mean_BJD)
                before_J = torch.arange(J, device=x.device) - 1
                first_BJE = logits_BJE.detach() if config.first == "own" else torch.zeros_like(logits_BJE)
                # Logits of zero, the uniform weights, if no segment comes before.
                logits_BJE = torch.where(
                    before_J[:, None] < 0, first_BJE, logits_BJE.index_select(1, before_J.clamp_min(0))
                )
                logits_GE, count_G = logits_BJE.flatten(0, 1), count_BJ.flatten()
            else:
                count_G = real_BS.sum(1)
                logits_GE = self.gate(x_BSD.sum(1) / count_G.clamp_min(1)[:, None])
            weights_GE = self._weights(logits_GE)
            chosen_E = torch.where(weights_GE > 0, count_G[:, None], 0.0).sum(0).to(torch.int64)
            return MergeRouting(
                weights_GE=weights_GE,
                tokens_per_group=L,
                groups_per_sequence=J,
                tokens_per_expert_E=chosen_E,
                num_tokens=B * S,
                in_segments=config.kind == "lory",
                logits_GE=logits_GE,
                valid_T=None if valid_BS is None else valid_BS.flatten(),
            )

    def _weights(self, logits_GE: Tensor) -> Tensor:
        config = self.config
        if config.kind == "meo":
            top_k = config.num_merged(self.num_experts)
            best = topk_gate(logits_GE, top_k, normalize=config.normalizes, backend=self.backend)
            return torch.zeros_like(logits_GE).scatter(-1, best.expert_ids_TK, best.gates_TK)
        if self.training and config.expert_dropout:
            kept_GE = torch.rand_like(logits_GE) >= config.expert_dropout
            # A group that lost every expert keeps them all.
            kept_GE = kept_GE | ~kept_GE.any(-1, keepdim=True)
            logits_GE = logits_GE.masked_fill(~kept_GE, -torch.inf)
        return logits_GE.softmax(-1)


@dataclass(frozen=True)
class Merge(RouterConfig):
    """One merged expert for each sequence: ``y = f(x; sum_e p_e W_e)``, with ``p`` a softmax of the gate's logits.

    ================  ==============================================================================================
    SMEAR             ``Merge("smear")``: ``p`` from the mean of the sequence's tokens (arXiv 2306.03745)
    Lory              ``Merge("lory", segment_length=256)``: ``p`` of a segment from the mean of the segment before it
                      (arXiv 2405.03133, section 3.1)
    MEO               ``Merge("meo", top_k=2)``: as SMEAR, but only of the ``top_k`` best experts (arXiv 2310.09832)
    ================  ==============================================================================================

    A token costs one expert whatever E is; merging costs ``2 E`` times an expert's parameters for each sequence or
    segment, in FLOPs, and the memory of one expert for each. Differentiable, so no balance loss applies.

    Attributes:
        kind: "smear", "lory" or "meo".
        top_k: experts merged by "meo"; None: 2.
        normalize: of "meo". True: the merged weights sum to 1. False: they are the softmax over all E experts. None:
            True for ``top_k`` > 1, False for 1, for which it would cut the gate's gradient.
        segment_length: tokens of a segment of "lory"; None: 256.
        first: weights of the first segment of "lory", which has no segment before it. "uniform": 1 / E. "own": from its
            own mean with a stopped gradient, the paper's choice; a later token of the first segment then changes an
            earlier one, which a causal decoder rejects.
        expert_dropout: of "smear": in training each sequence loses each expert with this probability, and the weights
            of the others are normalized to sum to 1.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2306.03745"
    router_class = MergeRouter
    layer_kind = "merged"
    layer_options = frozenset()
    default_group = "sequence"
    depends_on = "sequence"

    kind: Literal["smear", "lory", "meo"] = "smear"
    top_k: Count | None = None
    normalize: bool | None = None
    segment_length: Count | None = None
    first: Literal["uniform", "own"] = "uniform"
    expert_dropout: ShareBelowOne = 0.0
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default, kind in (
            ("top_k", None, "meo"),
            ("normalize", None, "meo"),
            ("segment_length", None, "lory"),
            ("first", "uniform", "lory"),
            ("expert_dropout", 0.0, "smear"),
        ):
            if getattr(self, name) != default and self.kind != kind:
                raise ValueError(f"{name}={getattr(self, name)!r} is an option of kind={kind!r}, not of {self.kind!r}")
        if self.top_k == 1 and self.normalize:
            raise ValueError("normalize=True with top_k=1 makes every weight 1: the router would get no gradient")

    @property
    def normalizes(self) -> bool:
        """The value of ``normalize`` with its default filled in."""
        return self.num_merged(2) > 1 if self.normalize is None else self.normalize

    def num_merged(self, num_experts: int) -> int:
        """Return how many experts have a part in a merged one."""
        return num_experts if self.kind != "meo" else 2 if self.top_k is None else self.top_k

    def segments(self, length: int) -> tuple[int, int]:
        """Return how many groups a sequence of ``length`` tokens has, and the tokens of each."""
        if self.kind != "lory":
            return 1, length
        L = 256 if self.segment_length is None else self.segment_length
        if isinstance(length, int):
            # A short sequence is not filled up. If the length is symbolic (export) the branch would fix it.
            L = min(L, length)
        return (-(-length // L) if L else 1), L

    def source(self) -> str:
        papers = {"smear": self.paper, "lory": "2405.03133", "meo": "2310.09832"}
        return f"Merge(kind={self.kind!r}) (arXiv {papers.get(str(self.kind), self.paper)})"

    def check(self, num_experts: int) -> None:
        if self.num_merged(num_experts) > num_experts:
            raise ValueError(f"top_k={self.num_merged(num_experts)} exceeds num_experts={num_experts}")

    def check_group(self, group: str | int) -> None:
        check_sequence_group(group, "Merge")

    @property
    def is_causal(self) -> bool:
        return self.kind == "lory" and self.first == "uniform"

    @property
    def reads_position(self) -> bool:
        """A token's segment decides."""
        return self.kind == "lory"

    @property
    def has_exact_gradient(self) -> bool:
        """The gradient of the first segment's own weights is stopped."""
        return self.first != "own"

    def pairs_per_token(self, num_experts: int) -> float:
        # A token goes through one expert's worth of parameters: how Lory counts active ones.
        return 1.0

    def layer_flops_per_token(
        self, dim: int, out_dim: int, num_experts: int, params_per_expert: int, tokens_per_group: int | None
    ) -> float:
        length = _known(tokens_per_group, "Merge")
        # The gate reads one mean per group, and each parameter of a merged expert is a weighted sum of E.
        return 2.0 * self.segments(length)[0] * num_experts * (dim + params_per_expert) / length

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        length = _known(tokens_per_group, "Merge")
        groups, size = self.segments(length)
        return groups * size / length  # the last segment is filled up

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts
