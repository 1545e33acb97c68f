"""Formulas of the balance losses: pure functions of sums over tokens.

Each is a function of sums over the tokens of *all* ranks and micro-steps it is given, with its denominator in the
signature, so that a loss is the same however the tokens are split over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over(total: Tensor, count: Tensor | float) -> Tensor:
    """Return the mean of ``count`` values from their sum; 0 if there are none."""
    return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def load_balancing_loss(score_sum_E: Tensor, chosen_per_expert_E: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``E * sum_e f_e P_e``: 1 at balance, E when one expert takes all.

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token; ``P_e`` is it over ``num_tokens``.
        chosen_per_expert_E: (E,), pairs that chose each expert before capacity; ``f_e`` is its share of all pairs.
        num_tokens: number of non-padding tokens.
    """
    share_E = chosen_per_expert_E / chosen_per_expert_E.sum().clamp_min(1)
    return mean_over(len(score_sum_E) * (share_E * score_sum_E).sum(), num_tokens)


def squared_cv(total_E: Tensor) -> Tensor:
    """Return the variance over the squared mean of (E,) sums, the variance over E and not E - 1; 0 at balance.

    For the summed scores it is ``importance`` (arXiv 2106.05974, eq. 6), for the ``smooth_load`` it is ``load``.
    """
    mean = total_E.mean()
    return (total_E - mean).square().mean() / mean.square().clamp_min(1e-20)


def entropy(p: Tensor) -> Tensor:
    """Return ``-sum p log p`` over the last axis, in nats; the gradient is finite at 0."""
    return -(p * p.clamp_min(1e-20).log()).sum(-1)


def mutual_information_loss(score_sum_E: Tensor, entropy_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``-I = H(expert | condition) - H(expert)``: 0 where the two are independent, ``-log(E)`` at best.

    The condition is the token (arXiv 2306.04640) or its task (arXiv 2212.08066, tasks weighted by their tokens).

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token.
        entropy_sum: sum over tokens of the entropy of the token's scores, or of its task's mean scores.
        num_tokens: number of non-padding tokens.
    """
    return mean_over(entropy_sum, num_tokens) - entropy(mean_over(score_sum_E, num_tokens))


def entropy_of_means(score_sum_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """Return the entropy of each group's mean scores, (G,), from (G, E) sums and token counts; 0 without tokens."""
    return entropy(score_sum_GE / tokens_G.clamp_min(1)[:, None])


def local_entropy_loss(entropy_sum_G: Tensor, tokens_G: Tensor) -> Tensor:
    """Return the sum over modalities of the mean entropy of their tokens' scores (LIMoE): low if gates are sharp.

    Args:
        entropy_sum_G: (G,), sum of the entropies of each modality's tokens.
        tokens_G: (G,), number of its non-padding tokens.
    """
    return (entropy_sum_G / tokens_G.clamp_min(1)).sum()


def global_entropy_loss(score_sum_GE: Tensor, tokens_G: Tensor, threshold: Tensor | float) -> Tensor:
    """Return the sum over modalities that have tokens of ``max(0, threshold - H(mean scores))`` (LIMoE): 0 if each
    modality uses about ``exp(threshold)`` experts or more.

    Args:
        score_sum_GE: (G, E), sums of the scores of each modality's tokens.
        tokens_G: (G,), number of its non-padding tokens.
        threshold: entropy in nats, one for all modalities or (G,).
    """
    return ((threshold - entropy_of_means(score_sum_GE, tokens_G)).relu() * (tokens_G > 0)).sum()


def sequence_losses(score_sum_BE: Tensor, chosen_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """Return ``E * sum_e f_e P_e`` of each sequence, (B,); 0 without tokens (arXiv 2412.19437, eq. 17-20).

    Args:
        score_sum_BE: (B, E), sums of the scores of its tokens; ``P_e`` is it over ``tokens_B``.
        chosen_BE: (B, E), pairs that chose each expert; ``f_e`` is its share of the sequence's pairs.
        tokens_B: (B,), number of its non-padding tokens.
    """
    share_BE = chosen_BE / chosen_BE.sum(-1, keepdim=True).clamp_min(1)
    return score_sum_BE.shape[-1] * (share_BE * score_sum_BE).sum(-1) / tokens_B.clamp_min(1)


def smooth_load(logits_TE: Tensor, threshold_TE: Tensor, noise_std: float | Tensor) -> Tensor:
    """Return the probability that fresh noise lifts each logit over its threshold, (T, E)."""
    return torch.special.ndtr((logits_TE - threshold_TE) / noise_std)


def sparsity_loss(score_sum_E: Tensor, positive_E: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``E * sum_e f_e m_e``, with ``f_e`` the share of tokens whose score of e is positive and ``m_e`` the mean
    score: an L1 norm that weighs the scores of busy experts more (ReMoE, arXiv 2412.14711).

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which are not negative.
        positive_E: (E,), number of tokens with a positive score.
        num_tokens: number of non-padding tokens.
    """
    return len(score_sum_E) * (mean_over(positive_E, num_tokens) * mean_over(score_sum_E, num_tokens)).sum()


def localized_loss(total: Tensor, square: Tensor, count: Tensor | float) -> Tensor:
    """Return the variance over the mean of ``count`` values, from the sums of them and of their squares; 0 without any.

    For the weighted importances of experts in sequences it is LoRAMoE's localized balance (arXiv 2312.09979).
    """
    mean = mean_over(total, count)
    return (mean_over(square, count) - mean.square()) / mean.clamp_min(1e-20)


def contrast_losses(y_SD: Tensor, expert_S: Tensor, kept_S: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the contrast of each expert's outputs with the other experts', float32 (S,), and which rows have one.

    For row i, with the similarities ``s_ij = u_i . u_j / temperature`` and ``u = y / sqrt(1 + |y|^2)``, it is the mean
    over the other rows p of its expert of ``-log(exp(s_ip) / sum over j != i of exp(s_ij))``, as in MoELoRA (arXiv
    2402.12851): outputs of one expert attract each other, and outputs of different experts repel. Long outputs are
    compared by their direction; an output of zero, as from a new low-rank update, has none, and its gradient is
    bounded.

    Args:
        y_SD: (S, D) outputs.
        expert_S: int64 (S,), the expert of each.
        kept_S: bool (S,), False for rows that are left out.
        temperature: positive.
    """
    y_SD = torch.where(kept_S[:, None], y_SD.to(torch.float32), 0)
    u_SD = y_SD * (1 + y_SD.square().sum(-1, keepdim=True)).rsqrt()
    is_other_SS = kept_S & ~torch.eye(len(u_SD), dtype=torch.bool, device=u_SD.device)
    is_same_SS = is_other_SS & (expert_S == expert_S[:, None])
    similar_SS = (u_SD @ u_SD.T / temperature).masked_fill(~is_other_SS, torch.finfo(torch.float32).min)
    log_share_SS = similar_SS.log_softmax(-1)
    num_same_S = is_same_SS.sum(-1)
    has_loss_S = kept_S & (num_same_S > 0)
    loss_S = -torch.where(is_same_SS, log_share_SS, 0).sum(-1) / num_same_S.clamp_min(1)
    return torch.where(has_loss_S, loss_S, 0), has_loss_S
