"""Mixture-of-Tokens: experts compute weighted means of the tokens at one position of several sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contract import RoutingContext, SlotRouting, TokenGroups, span
from ...fields import Count, Positive
from ...kernels.eager import outside_autocast
from ..gates import LinearGate
from ..pairs.smooth import check_falls, falling_temperature
from ..router import LinearGateConfig, Router
from ..selection import Capacity
from .soft import by_sequence


class MixtureOfTokensRouter(Router):
    """The router of ``MixtureOfTokens``: the share of each token of a group in an expert's input for the group.

    Attributes:
        gate: the module of the logits; its parameters are named as in ``TokenChoice``.
        num_steps: int64 () buffer, the optimizer steps so far, where the temperature falls; else None.
    """

    num_steps: Tensor | None

    def __init__(self, dim: int, num_experts: int, config: MixtureOfTokens, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config = num_experts, config
        self.gate = LinearGate(dim, num_experts, config.init_scale)
        falls = config.tau_end < config.tau_start
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64) if falls else None)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.num_steps is not None:
            self.num_steps.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.num_steps is not None:
            self.num_steps += 1

    @property
    def temperature(self) -> Tensor | float:
        """The temperature of this step; see ``falling_temperature``."""
        config = self.config
        if self.num_steps is None:
            return config.tau_start
        return falling_temperature(self.num_steps, config.tau_start, config.tau_end, config.anneal_steps)

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> SlotRouting:
        config = self.config
        with outside_autocast(x.device):
            x_BSD, valid_BS = by_sequence(x, context)
            B, S, _ = x_BSD.shape
            groups = TokenGroups.of(B, S, config.group_size)
            valid_T = None if valid_BS is None else valid_BS.flatten()
            is_real_gN = groups.is_filled(x.device)
            if valid_T is not None:
                is_real_gN = is_real_gN & groups.part(valid_T)
            is_empty_gN1 = ~is_real_gN[:, :, None]
            logits_TE = self.gate(x_BSD.flatten(0, 1)) / self.temperature
            lowest = torch.finfo(logits_TE.dtype).min  # not -inf: a group of only padding would be NaN
            shares_gNE = groups.part(logits_TE).masked_fill(is_empty_gN1, lowest).softmax(0)
            shares_TE = groups.join(shares_gNE.masked_fill(is_empty_gN1, 0.0))
            shares_BSEP = shares_TE.unflatten(0, (B, S)).unsqueeze(-1)
            return SlotRouting(
                dispatch_GSEP=shares_BSEP,
                combine_GSEP=shares_BSEP,
                tokens_per_expert_E=is_real_gN.any(0).sum().repeat(self.num_experts),
                num_tokens=B * S,
                valid_T=valid_T,
                across=groups,
            )


@dataclass(frozen=True)
class MixtureOfTokens(LinearGateConfig):
    """Mixture-of-Tokens (arXiv 2310.15961): an expert computes one mixed token for each group of tokens.

    A group has the tokens at the same position of up to ``group_size`` sequences of the batch. With the shares
    ``w_te = softmax over the tokens t of the group of (W x_t)_e / tau`` an expert computes the mixed token
    ``sum_t w_te x_t``, and its output goes back to every token of the group with the same share:
    ``y_t = sum_e w_te f_e(sum_u w_ue x_u)``. It is differentiable and even by construction: no balance loss applies.

    A position never sees another one, so causal decoders may have it. But the sequences of a batch change each other's
    output, in evaluation too: a score depends on the batches it is taken in, and a token that comes by itself takes
    every expert with share 1. So it does not decode step by step. A model for serving continues from these weights with
    ``TokenChoice``, whose gate has the same parameters, and is tuned a little (the paper's transition tuning).

    A batch of other than a multiple of ``group_size`` sequences makes groups of nearly equal, smaller sizes.

    Attributes:
        group_size: g, most sequences of a group. A layer costs E / g experts per token.
        tau_start, tau_end: temperatures; a low one lets each expert take one token of the group. From one to the other
            it falls by the same factor each optimizer step, which ``update_expert_bias(model, tape)`` counts.
        anneal_steps: optimizer steps between them.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2310.15961"
    router_class = MixtureOfTokensRouter
    layer_kind = "slots"
    layer_options = frozenset({"backend"})
    depends_on = "batch"
    reads_batch_index = True

    group_size: Count = 32
    tau_start: Positive = 1.0
    tau_end: Positive = 1.0
    anneal_steps: Count = 10_000
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_falls(self.tau_start, self.tau_end)

    def check_group(self, group: str | int) -> None:
        if group != "batch":
            raise ValueError(f"group={group!r} is another group than that of MixtureOfTokens: set its group_size")

    def pairs_per_token(self, num_experts: int) -> float:
        # A token has a share in what every expert computes.
        return float(num_experts)

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        return num_experts / self.group_size

    def layer_flops_per_token(
        self, dim: int, out_dim: int, num_experts: int, params_per_expert: int, tokens_per_group: int | None
    ) -> float:
        # Tokens into mixed ones, and back.
        return 2.0 * num_experts * (dim + out_dim)
